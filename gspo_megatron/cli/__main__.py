"""`python -m gspo_megatron.cli` is the command `gspo-megatron`."""

import sys

from gspo_megatron.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
