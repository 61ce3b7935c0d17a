"""The store: conversations and their items in a database, and replies that wait in memory to be written.

It imports only the ground. Start reading at conversations.py for what is stored, and at write_buffer.py for how
replies reach the database while they grow; database.py has the tables, ownership.py holds that one process uses them,
item.py is one message, storage_limits.py says how much may be stored.
"""
