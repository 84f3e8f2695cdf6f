"""A Megatron checkpoint to a Hugging Face folder, which transformers loads: convert_megatron_to_hf.py SOURCE TARGET

The same as `gspo-megatron convert`, which takes both directions.
"""

import sys

from gspo_megatron import convert, process

if __name__ == "__main__":
    with process.guard():
        sys.exit(convert.main(sys.argv[1:], "megatron_to_hf", "convert_megatron_to_hf.py"))
