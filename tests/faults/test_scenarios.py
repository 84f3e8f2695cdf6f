"""A part of tools/validation/fault_matrix.py for every day: each kind of fault once, in real trainings under torchrun."""

import pytest

from tools.validation.faults import scenarios
from tools.validation.faults.disks import CannotMount
from tools.validation.faults.rows import ROWS, Row
from tools.validation.faults.scenarios import Whole


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Whole:
    return scenarios.undisturbed(tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for row in ROWS if row.in_ci], ids=lambda row: row.fault)
def test_what_breaks_is_survived(tmp_path, whole, row: Row):
    try:
        assert row.run(tmp_path / "run", whole)
    except CannotMount as error:
        pytest.skip(f"only root may mount a small disk: {error}")


def test_every_row_has_a_name_of_its_own():
    assert len({row.fault for row in ROWS}) == len(ROWS) >= 20
