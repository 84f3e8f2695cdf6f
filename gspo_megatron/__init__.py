"""RL post-training of Mixture-of-Experts language models on Megatron-Core, with GSPO."""

__version__ = "0.2.0"
