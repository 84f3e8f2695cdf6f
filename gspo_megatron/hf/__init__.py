"""Hugging Face folders and their movement: strict reading, loading into model chunks, export, conversion of whole
folders.

What a config.json means, and how tensors are named, is models/.
"""
