"""Everything the app is made of, in packages; `models/README.md` is the map.

Imports run one way: web -> protocols -> generation -> language, users -> engine, ops, store -> the ground, which is
errors, messages, options, scratch, settings and validation.
"""
