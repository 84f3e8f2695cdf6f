"""Everything Megatron-Core: parallel/, layers/, model/, engine/, checkpoint/, each above the one before.

What is computed from the model's outputs (losses, advantages) is algorithms/; where prompts and rewards come from is
not known here.

Importing this package makes Megatron importable on a machine without CUDA (cpu_shim.py), which has to happen before the
first import of megatron; nothing outside this package imports megatron.
"""

import warnings

from gspo_megatron.backend import cpu_shim

# Megatron announces at import, from every rank, each optional library that it does without (the header names the
# kernels that run instead), and calls collectives by names that torch 2.13 has begun to retire.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core\.")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
cpu_shim.install()
