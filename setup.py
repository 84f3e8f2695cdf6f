"""Builds the C++ of csrc/ against the torch that is installed. All metadata is in pyproject.toml.

Two files: `_native`, the kernels, which torch.ops.load_library opens and which know no Python; and `_collectives`, a
Python module (pybind11), because a ProcessGroup comes from Python. Where torch has CUDA and nvcc is there, the CUDA
kernels are built in, for ARCHITECTURES (or TORCH_CUDA_ARCH_LIST); if they fail, the kernels are built without them.

A package without them still works: Python takes their place, and gspo_megatron.ops.library.status() says so. So a
missing compiler, or a compile error, is a warning here; GSPO_MEGATRON_NATIVE=1 turns it into an error, and
GSPO_MEGATRON_NATIVE=0 leaves them out.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

# The CUDA bindings need torch with CUDA; csrc/tests/ holds programs of the tests.
CUDA_SOURCES = [
    f"csrc/{name}"
    for op in ("sequence_ratio", "token_surrogate")
    for name in (f"bindings/{op}_cuda.cpp", f"cuda/{op}.cu")
]
COLLECTIVES = ["csrc/bindings/collectives.cpp"]
PROGRAMS = [str(path) for path in Path("csrc/tests").glob("*.cpp")]
SOURCES = sorted({str(path) for path in Path("csrc").glob("**/*.cpp")} - {*CUDA_SOURCES, *COLLECTIVES, *PROGRAMS})
HEADERS = sorted(str(path) for pattern in ("**/*.h", "**/*.inc") for path in Path("csrc").glob(pattern))
# Wide vectors are passed between functions that are always inlined, so their calling convention (psabi) is no concern.
FLAGS = [
    "-O3",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-psabi",
    "-Wno-unused-function",
    "-g0",
]

ARCHITECTURES = (80, 90, 100)  # and PTX of the newest, for what comes after


def find_torch() -> bool:
    """Whether torch can be imported here, or in the environment that pip installs into.

    pip builds in an environment of its own, without torch. Its interpreter still knows the real site-packages, and the
    library must be built with the torch that it will run with.
    """
    if importlib.util.find_spec("torch") is None:
        sys.path += [p for p in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")} if p not in sys.path]
    return importlib.util.find_spec("torch") is not None


def cuda_flags() -> list[str] | None:
    """Arguments for nvcc, or None where CUDA kernels cannot be built."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    nvcc = shutil.which("nvcc", path=os.path.join(CUDA_HOME or "", "bin"))
    if torch.version.cuda is None or nvcc is None:
        return None
    flags = ["-O3", "-std=c++17"]
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return flags  # torch adds those
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    wanted = [a for a in ARCHITECTURES if f"compute_{a}" in known]
    if not wanted:
        return None
    flags += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in wanted]
    return [*flags, f"-gencode=arch=compute_{wanted[-1]},code=compute_{wanted[-1]}"]


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
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    release = ".".join(torch.__version__.split(".")[:2])

    def library(nvcc_flags: list[str] | None):
        kind, sources = (CppExtension, SOURCES) if nvcc_flags is None else (CUDAExtension, SOURCES + CUDA_SOURCES)
        extension = kind(
            "gspo_megatron.ops._native",
            sources,
            depends=HEADERS,
            extra_compile_args={"cxx": FLAGS, "nvcc": nvcc_flags or []},
            extra_link_args=["-fopenmp"],
            optional=wanted != "1" and nvcc_flags is None,
        )
        extension.libraries.remove("torch_python")  # no Python in it
        return extension

    def collectives():
        # USE_DISTRIBUTED: torch's headers declare nothing of c10d without it.
        flags = ["-O1", "-DUSE_DISTRIBUTED", "-fvisibility=hidden", "-Wall", "-g0"]
        return CppExtension(
            "gspo_megatron.ops._collectives", COLLECTIVES, extra_compile_args=flags, optional=wanted != "1"
        )

    class Build(BuildExtension):
        def build_extensions(self):
            try:
                if nvcc_flags is not None:
                    try:
                        return super().build_extensions()
                    except Exception as error:
                        print(
                            f"warning: the CUDA kernels could not be built ({error}); trying without", file=sys.stderr
                        )
                        plain = library(None)  # what setuptools has put on the extension beside these stays
                        for name in ("sources", "include_dirs", "library_dirs", "libraries", "extra_compile_args"):
                            setattr(self.extensions[0], name, getattr(plain, name))
                super().build_extensions()
            except Exception as error:
                if wanted == "1":
                    raise
                print(f"warning: the C++ library could not be built ({error}); installed without it", file=sys.stderr)
                self.extensions = []

        def get_ext_filename(self, name):
            # torch's ABI changes with its release, and Python's with its own.
            suffix = sysconfig.get_config_var("EXT_SUFFIX") if name.endswith("_collectives") else ".so"
            return f"{name.replace('.', os.sep)}-torch{release}{suffix}"

    nvcc_flags = cuda_flags()
    return {"ext_modules": [library(nvcc_flags), collectives()], "cmdclass": {"build_ext": Build}}


setup(**native())
