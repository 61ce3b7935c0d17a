"""The packages of the app; `models/README.md` is the map.

Imports go one way: web -> protocols -> generation -> language, users -> engine, ops, store -> the ground, which is the
modules of this package itself.
"""
