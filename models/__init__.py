"""Everything the app is made of, in packages; `models/README.md` is the map.

Imports run one way: web -> protocols -> generation -> language, users -> store, engine, ops -> the ground, which is
errors, messages, options, settings and validation.
"""
