"""Loss, gradient, ratios and clip decisions of one step equal the plain formula's in every layout.

Every run of the tests compares one case a layout; `pytest -m parity` compares the whole matrix, as
tools/validation/parity_matrix.py does.
"""

from collections.abc import Iterable

import psutil
import pytest
import torch.distributed as dist

from tools.validation.parity import cases, run, worker
from tools.validation.parity.cases import Case
from tools.validation.ranks import spawn

SMALL, MATRIX = cases.small(), cases.matrix()


def truths_and_one_rank(rank: int, world_size: int, chosen: list[Case]) -> tuple[dict, dict]:
    truths = run.truths(chosen)
    return truths, worker.run_cases(chosen, truths, lambda case, errors: None)


def on_ranks(rank: int, world_size: int, chosen: list[Case], truths: dict) -> dict[str, run.Errors]:
    found = worker.run_cases(chosen, truths, lambda case, errors: None)
    threads = psutil.Process().num_threads()
    assert threads < 64, f"{threads} threads: layouts leave their process groups behind"
    return found if dist.get_rank() == 0 else {}


def compare(chosen: Iterable[Case], timeout: float) -> dict[str, run.Errors]:
    truths, found = spawn(truths_and_one_rank, 1, chosen, timeout=timeout)[0]
    for ranks in (2, 4):
        found |= spawn(on_ranks, ranks, chosen, truths, timeout=timeout)[0]
    return found


@pytest.fixture(scope="module")
def small() -> dict[str, run.Errors]:
    return compare(SMALL, 280)


@pytest.fixture(scope="module")
def matrix() -> dict[str, run.Errors]:
    return compare(MATRIX, 1500)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_layout_equals_the_formula(small, case):
    assert small[case.name].failures(case.dtype) == []


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.timeout(4000)
@pytest.mark.parametrize("case", MATRIX, ids=lambda case: case.name)
def test_case_equals_the_formula(matrix, case):
    assert matrix[case.name].failures(case.dtype) == []


def test_a_broken_limit_is_named():
    good = run.Errors(1e-7, 1e-6, 1e-6, 1e-6, 0, "w", 1.0)
    assert good.failures("fp32") == []
    assert len(good.failures("fp64")) == 4  # loss, ratio, gradient, and where the gradient is off
    assert good.failures("bf16") == []
    bad = run.Errors(float("nan"), 1e-6, 2e-5, 1e-6, 3, "w", 1.0).failures("fp32")
    assert [sentence.split()[0] for sentence in bad] == ["loss", "ratio", "trained"]
