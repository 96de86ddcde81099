"""Adapters of `irpe.equip`: one third-party library per file."""
