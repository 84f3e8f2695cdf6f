"""Layers of our own where Megatron's need a GPU or cannot do what is needed: attention, norms, rotary angles."""
