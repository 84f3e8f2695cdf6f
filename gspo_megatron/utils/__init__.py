"""These helpers for bytes and files know nothing of the rooms above."""
