"""Megatron's distributed checkpoints: written by a thread, made visible by a rename, loaded under any layout."""
