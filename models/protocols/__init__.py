"""Protocols: each parses the requests of its clients, asks `ResponseService` for replies, and renders the events.

It imports generation/interface.py and generation/events.py, store, users and the ground; no Starlette and no torch.
Start reading at plain_text.py, the smallest one, then responses/, the main one; completion.py and what it imports are
Chat Completions. README.md has the protocols.
"""
