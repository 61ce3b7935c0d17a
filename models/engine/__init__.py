"""The engine: token ids in, token ids out, for many sequences at once.

It knows no text, no user and no database, and only async_engine.py knows asyncio.
It imports only the ground (errors, messages, private_files, scratch).
Start reading at engine.py: a step is scheduler.py, then a runner (runner.py), then sampler.py. README.md explains it.
"""
