"""Loads the C++ of csrc/ once, and says what runs.

The kernels are registered with torch.library under the same names as the Python references, so the dispatcher picks
them where they exist and nothing else in the package asks whether they do. The collectives are a Python module of their
own, which ops/collectives.py asks for.
"""

import importlib.util
import sysconfig
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

FOLDER = Path(__file__).parent
OPS = (
    "sequence_partials",
    "gspo_forward",
    "gspo_backward",
    "token_surrogate_forward",
    "token_surrogate_backward",
)
COLLECTIVES = ("reduce_tables", "publish")
REMEDY = "Install again with a C++ compiler present: pip install --no-build-isolation --no-deps ."


@cache
def load() -> str:
    """Load the library if it was built for this release of torch. Returns "" or the reason why it is not loaded."""
    release = ".".join(torch.__version__.split(".")[:2])
    path = FOLDER / f"_native-torch{release}.so"
    if not path.exists():
        others = sorted(other.stem.removeprefix("_native-") for other in FOLDER.glob("_native-torch*.so"))
        if others:
            return f"the C++ library was built for {', '.join(others)}, not for torch {torch.__version__}. {REMEDY}"
        return f"the C++ library was not built. {REMEDY}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"the C++ library does not load ({error}). {REMEDY}"
    return ""


@cache
def load_collectives() -> tuple[ModuleType | None, str]:
    """Load the C++ module if it was built for this Python and release of torch. Returns the reason where it was not."""
    release = ".".join(torch.__version__.split(".")[:2])
    path = FOLDER / f"_collectives-torch{release}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not path.exists():
        return None, f"the C++ collectives were not built for this Python and torch {torch.__version__}. {REMEDY}"
    spec = importlib.util.spec_from_file_location("gspo_megatron.ops._collectives", path)
    assert spec is not None and spec.loader is not None  # EXT_SUFFIX is one that Python loads
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        return None, f"the C++ collectives do not load ({error}). {REMEDY}"
    return module, ""


def has_cuda() -> bool:
    """Ask whether the library brought kernels for CUDA; without them a GPU runs the PyTorch formulas."""
    return not load() and all(
        torch._C._dispatch_has_kernel_for_dispatch_key(f"gspo_megatron::{op}", "CUDA") for op in OPS
    )


def status() -> dict[str, str]:
    """Say what runs each op: {"sequence_partials": "C++ (avx512)", ...} or "PyTorch formulas, slower: why".

    "C++ (avx512), CUDA" where the library has kernels for GPUs too; "C++" or "torch.distributed: why" for collectives.
    """
    reason, (module, missing) = load(), load_collectives()
    together = dict.fromkeys(COLLECTIVES, "C++" if module else f"torch.distributed: {missing}")
    if reason:
        return dict.fromkeys(OPS, f"PyTorch formulas, slower: {reason}") | together
    cuda = ", CUDA" if has_cuda() else ""
    return dict.fromkeys(OPS, f"C++ ({torch.ops.gspo_megatron.instruction_set()}){cuda}") | together
