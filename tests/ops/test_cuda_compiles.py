"""The CUDA kernels compile without a warning for every architecture that the package names, and without torch."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
NVCC = shutil.which("nvcc")
ARCHITECTURES = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in (80, 90, 100)]


@pytest.mark.skipif(NVCC is None, reason="no nvcc, so the CUDA kernels are not compiled")
@pytest.mark.parametrize(("source", "kernels"), [("sequence_ratio.cu", 6), ("token_surrogate.cu", 3)])
def test_the_kernels_compile(tmp_path, source, kernels):
    warnings = ["-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror", "-Xptxas", "-v"]
    command = [NVCC, "-c", CUDA / source, "-o", tmp_path / "kernels.o", "-O3", "-std=c++17", *warnings]
    command += [*ARCHITECTURES, "-gencode=arch=compute_100,code=compute_100"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    # Sums live in registers: an array that the compiler cannot keep there would go to memory for every token.
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", done.stderr)
    assert len(frames) == kernels * len(ARCHITECTURES) and set(frames) == {("0", "0")}


def test_no_torch_header_reaches_nvcc():
    """They take a minute through nvcc, and the kernels must build where torch has no CUDA."""
    seen, queue = set(), [CUDA / "sequence_ratio.cu", CUDA / "token_surrogate.cu"]
    while queue:
        path = queue.pop()
        seen.add(path.name)
        for name in re.findall(r'#include [<"]([^>"]+)[>"]', path.read_text()):
            assert not name.startswith(("torch/", "ATen/", "c10/")), f"{path.name} includes {name}"
            local = (path.parent / name).resolve()
            if local.exists() and local.name not in seen:
                queue.append(local)
    assert {"blocks.h", "numbers.h", "sequence_ratio.h", "sequence_ratio_cuda.h", "token_blocks.h"} <= seen
