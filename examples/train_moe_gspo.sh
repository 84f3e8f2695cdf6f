#!/bin/sh
""":"
# Trains a small Mixture-of-Experts model with GSPO. This file is a shell script and a Python program at once:
#   torchrun --nproc-per-node 4 examples/train_moe_gspo.sh --steps 20             torchrun runs it with Python
#   torchrun --no-python --nproc-per-node 4 examples/train_moe_gspo.sh            torchrun executes it as a script
#   bash examples/train_moe_gspo.sh --steps 20                                    starts its own ranks (NPROC of them)
# Python reads the lines of the shell as a text without meaning; the shell ends at exec.
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
if [ -n "$VIRTUAL_ENV" ] && [ -x "$VIRTUAL_ENV/bin/python" ]; then python=$VIRTUAL_ENV/bin/python
elif [ -x "$root/.venv/bin/python" ]; then python=$root/.venv/bin/python  # made by `make install`, not activated
else python=python3; fi
exec "$python" "$0" "$@"
: <<'# end of the Python program'
":"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# A process that imports this file, as those of multiprocessing do, must not train.
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from gspo_megatron.cli.main import console

    sys.exit(console(["train", str(ROOT / "examples/recipes/moe_gspo.yaml"), *sys.argv[1:]]))
# end of the Python program
