"""Generation: which reply gets a slot, the responses that are running, and who follows them.

It imports language, store, ops and the ground. It knows no protocol: protocols use only interface.py and events.py.
Start reading at manager.py, which runs replies; response.py is one of them, admission.py hands out slots.
"""
