"""Features: each file is one that plugs into server.py and engine.py, or a part of one.

This file makes the folder a package of its own: another package of this name, wherever it is
installed, is not taken for it.
"""
