"""Grammars: what the text of a reply must be, as constraints for the engine.

Start at `grammars.py` (`Grammars`), which compiles with llguidance. `lark.py` writes formats as Lark text, and
`limits.py` has what bounds the work that a text of a client can make.
"""
