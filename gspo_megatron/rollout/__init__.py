"""Responses come from here."""
