"""Reads llama.cpp's GGUF files: the model's configuration, where each parameter lies in the file, the tokenizer.

Nothing is converted or copied: a model is built without weights and filled tensor by tensor. May import the ground.
Start reading at `gguf_file.py`; `architectures.py` is the table of what each kind of model needs.
"""
