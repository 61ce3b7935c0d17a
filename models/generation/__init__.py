"""Generation: which response gets a slot, which responses run, and who follows them.

It imports language, users, store, ops and the ground. No protocol: protocols use only interface.py and events.py.
Start reading at manager.py, which runs responses; response.py is one response, admission.py decides who gets a slot.
"""
