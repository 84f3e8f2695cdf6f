"""The CPU kernels of every instruction set under the address and undefined-behaviour sanitizers.

The program is csrc/tests/cpu_selftest.cpp. It compares them with plain sums in long double, on vectors that end where
their heap block ends.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
SELFTEST = CSRC / "tests" / "cpu_selftest.cpp"
COMPILER = shutil.which("g++")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="no g++, so the CPU kernels are not built with sanitizers"),
]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("selftest")
    flags = ["-std=c++17", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-Wno-unused-function", *SANITIZE]
    # The kernels unoptimised: builds in half the time, and no access is optimised away.
    sources = {SELFTEST: "-O1", **dict.fromkeys(sorted((CSRC / "cpu").glob("*.cpp")), "-O0")}
    builds = [
        subprocess.Popen([COMPILER, *flags, level, "-c", path], cwd=folder, stderr=subprocess.PIPE)
        for path, level in sources.items()
    ]
    errors = [build.communicate()[1].decode() for build in builds]
    assert all(build.returncode == 0 for build in builds), "".join(errors)[-2000:]
    objects = [f"{path.stem}.o" for path in sources]
    subprocess.run([COMPILER, *SANITIZE, "-o", "selftest", *objects], cwd=folder, check=True)
    return folder / "selftest"


@pytest.mark.parametrize("instruction_set", ["generic", "avx2", "avx512"])
def test_the_kernels_stay_in_range_and_are_right(program, instruction_set):
    environment = {**os.environ, "GSPO_MEGATRON_ISA": instruction_set}
    done = subprocess.run([program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    name, comparisons = done.stdout.split()
    if name != instruction_set:
        pytest.skip(f"this machine has no {instruction_set}")
    assert int(comparisons) > 1_000_000
