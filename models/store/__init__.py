"""The store: conversations and their items in a database, and what waits in memory to be written.

It imports the ground alone. Start reading at conversations.py for what is stored, and at write_buffer.py for how
replies reach the database while they grow; database.py has the tables, item.py one message.
"""
