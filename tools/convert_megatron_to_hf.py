"""A Megatron checkpoint to a Hugging Face folder, which transformers loads: convert_megatron_to_hf.py SOURCE TARGET

The same as `gspo-megatron convert`, which takes both directions.
"""

import sys

from gspo_megatron.cli import convert
from gspo_megatron.process import lifecycle

if __name__ == "__main__":
    with lifecycle.guard():
        sys.exit(convert.main(sys.argv[1:], "megatron_to_hf", "convert_megatron_to_hf.py"))
