"""Upstreams: OpenAI-compatible servers, such as vLLM, that answer in place of our own engine.

It imports language (only the torch-free interface and history.py), ops and the ground. It loads no torch.
Start reading at upstream_chat.py, which is the `Chat`; upstream_reply.py asks for one reply, endpoint.py is one server.
"""
