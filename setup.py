"""Builds the C++ library of csrc/ against the torch that is installed. All metadata is in pyproject.toml.

A package without the library still works: its Python reference runs instead, and gspo_megatron.ops.library.status()
says so. So a missing compiler, or a compile error, is a warning here; GSPO_MEGATRON_NATIVE=1 turns it into an error,
and GSPO_MEGATRON_NATIVE=0 leaves the library out.
"""

import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

SOURCES = sorted(str(path) for path in Path("csrc").glob("**/*.cpp"))
HEADERS = sorted(str(path) for pattern in ("**/*.h", "**/*.inc") for path in Path("csrc").glob(pattern))
# Wide vectors are passed between functions that are always inlined, so their calling convention (psabi) is no concern.
FLAGS = ["-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fvisibility=hidden",
         "-Wall", "-Wno-psabi", "-Wno-unused-function", "-g0"]  # fmt: skip


def find_torch() -> bool:
    """Whether torch can be imported here, or in the environment that pip installs into.

    pip builds in an environment of its own, without torch. Its interpreter still knows the real site-packages, and the
    library must be built with the torch that it will run with.
    """
    if importlib.util.find_spec("torch") is None:
        sys.path += [p for p in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")} if p not in sys.path]
    return importlib.util.find_spec("torch") is not None


def native() -> dict:
    """Arguments of setup() that build the library, or none."""
    wanted = os.environ.get("GSPO_MEGATRON_NATIVE", "")
    if wanted == "0":
        return {}
    if shutil.which(os.environ.get("CXX", "c++").split()[0]) is None and shutil.which("g++") is None:
        if wanted == "1":
            raise SystemExit("GSPO_MEGATRON_NATIVE=1, but there is no C++ compiler")
        print("warning: no C++ compiler, so gspo-megatron is installed without its C++ library", file=sys.stderr)
        return {}
    if not find_torch():
        if wanted == "1":
            raise SystemExit("GSPO_MEGATRON_NATIVE=1, but torch is not installed: the library is built against it")
        print("warning: torch is not installed, so gspo-megatron is installed without its C++ library", file=sys.stderr)
        return {}

    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    release = ".".join(torch.__version__.split(".")[:2])

    class Build(BuildExtension):
        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:
                if wanted == "1":
                    raise
                print(f"warning: the C++ library could not be built ({error}); installed without it", file=sys.stderr)
                self.extensions = []

        def get_ext_filename(self, name):
            # Not a Python module: torch.ops.load_library opens it, and torch's ABI changes with its release.
            return f"{name.replace('.', os.sep)}-torch{release}.so"

    extension = CppExtension(
        "gspo_megatron.ops._native", SOURCES, depends=HEADERS, extra_compile_args={"cxx": FLAGS},
        extra_link_args=["-fopenmp"], optional=wanted != "1",
    )  # fmt: skip
    extension.libraries.remove("torch_python")  # no Python in it
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


setup(**native())
