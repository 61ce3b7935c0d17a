"""One server in several processes: the hub, which runs replies, and the workers, which talk to clients.

With one process, nothing here is used. May import everything below `protocols/`, but no torch. Start with `link.py`,
which calls methods in another process, then `service.py`, what the hub does for a worker, and `worker.py`, a worker's
side of it. README.md has the frames, and what happens when a process dies.
"""
