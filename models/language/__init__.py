"""Language: text in, text out. Loads models, builds prompts, turns tokens into text.

chat.py is the interface that the rest of the app sees: messages in, events out. chat.py loads no torch.
The package imports `models.engine` and the ground. Start reading at engine_chat.py, which answers messages with our
engine: prompt.py and chat_template.py make the prompt, reply_events.py the events; loader.py loads the model.
"""
