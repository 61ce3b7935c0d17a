"""The store: conversations and their items in a database, and replies that wait in memory to be written.

It imports only the ground. Start reading at item.py and place.py for what a conversation is made of, then at
conversations.py and responses.py for what can be asked; tree.py and rows.py have the SQL, database.py the tables.
write_buffer.py says how replies reach the database while they grow, ownership.py which processes may write them.
"""
