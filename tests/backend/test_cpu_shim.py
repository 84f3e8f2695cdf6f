"""What the shim must leave as it is."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import gspo_megatron.backend, torch
assert torch.empty(1, device="cuda").device.type == "cpu"  # the shim is there
with torch.device("meta"):
    print(torch.empty(2).device, torch.arange(3).device, torch.ones(1).device)
"""


def test_device_contexts_work_under_the_shim():
    """transformers builds models on the meta device; a factory that made real tensors there would stay unfilled. In a
    fresh process, because torch remembers its factories once for all."""
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["meta", "meta", "meta"], done.stderr
