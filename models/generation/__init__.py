"""Generation: which reply gets a slot, the replies that are running, and who follows them.

It imports language, users, store, ops and the ground. It knows no wire: protocols use interface.py and events.py alone.
Start reading at manager.py, which runs replies; response.py is one of them, admission.py hands out slots.
"""
