"""The command `irpe`, a file for each of its larger commands; `__main__.py` puts them together."""
