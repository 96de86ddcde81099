"""Adapters of `irpe.equip`: one third-party library per file, and `grid`, which knows height and width."""
