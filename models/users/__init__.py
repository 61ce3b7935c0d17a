"""Users: who may chat, who is connected, and the `users` commands of the command line.

It imports store, shared, ops and the ground. Start reading at users.py, which checks secrets.
sessions.py and devices.py know browsers, login_limiter.py blocks guessers, connections.py knows who is connected.
"""
