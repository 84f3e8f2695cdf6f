"""A Hugging Face folder to a Megatron checkpoint, which loads under any layout: convert_hf_to_megatron.py SOURCE TARGET

The same as `gspo-megatron convert`, which takes both directions.
"""

import sys

from gspo_megatron.cli import convert
from gspo_megatron.process import lifecycle

if __name__ == "__main__":
    with lifecycle.guard():
        sys.exit(convert.main(sys.argv[1:], "hf_to_megatron", "convert_hf_to_megatron.py"))
