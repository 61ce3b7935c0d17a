"""Users: who may chat, who is connected, and the `users` commands of the command line.

It imports `models.store` and the ground. Start reading at users.py, which checks secrets and session cookies;
login_limiter.py blocks addresses that guess secrets, connections.py knows who is connected.
"""
