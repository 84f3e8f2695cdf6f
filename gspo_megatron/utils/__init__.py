"""Helpers for bytes and files that know nothing of the rooms above."""
