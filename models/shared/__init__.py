"""Shared: what several hosts that run one Parley share through Redis. Without Redis, each host is alone.

It imports only the ground. Start reading at shared_state.py, which puts the parts together: limit_storage.py counts for
limits, presence.py knows which users are on other hosts, news.py tells them of changed conversations.
"""
