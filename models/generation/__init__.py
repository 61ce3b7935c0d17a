"""Generation: which response gets a slot, which responses run, and who follows them.

It imports language, users, store, shared, ops and the ground. No protocol: protocols use only interface.py, events.py.
Start reading at manager.py, which runs responses; response.py is one response, admission.py decides who gets a slot.
"""
