"""The text of a reply, told apart while it streams: reasoning, answer, and calls of tools.

Start at `parser.py` (`ReplyParser`). `families.py` has the table of the formats that models write. README.md says how
to add one.
"""
