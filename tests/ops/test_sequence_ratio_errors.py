"""Wrong types, shapes, devices and boundaries are named, in the same words with and without the C++ library."""

import pytest
import torch

from gspo_megatron.ops import sequence_ratio_reference as reference
from tests.ops.test_sequence_ratio import OPS, bounds, native


@pytest.fixture(params=[pytest.param("C++", marks=native), "reference"])
def partials(request):
    return OPS.sequence_partials if request.param == "C++" else reference.sequence_partials


WRONG = [
    ({"new": torch.zeros(4, dtype=torch.int64)}, TypeError, "logp_new is .*expected fp32, fp64, bf16 or fp16"),
    ({"old": torch.zeros(4, dtype=torch.complex64)}, TypeError, "logp_old is"),
    ({"old": torch.zeros(3)}, ValueError, r"logp_old has shape \[3\]; expected \[4\]"),
    ({"new": torch.zeros(2, 2)}, ValueError, r"logp_new has shape \[2, 2\]; expected \[4\]"),
    ({"mask": torch.ones(4, dtype=torch.int64)}, TypeError, "mask is .*expected bool, uint8, fp32 or fp64"),
    ({"mask": torch.ones(5)}, ValueError, r"mask has shape \[5\]"),
    ({"cu": torch.tensor([0, 4])}, TypeError, "cu_seqlens is .*expected int32"),
    ({"cu": torch.tensor([0, 3, 2, 4]).int()}, ValueError, r"cu_seqlens\[2\] = 2 is less than cu_seqlens\[1\] = 3"),
    ({"cu": torch.tensor([0, 5]).int()}, ValueError, "cu_seqlens ends at 5 but there are 4 tokens"),
    ({"cu": torch.tensor([-1, 4]).int()}, ValueError, r"cu_seqlens\[0\] = -1 is negative"),
    ({"cu": torch.zeros(0).int()}, ValueError, r"cu_seqlens has shape \[0\]; expected \[S \+ 1\]"),
    ({"entropy": torch.zeros(4).long()}, TypeError, "entropy is"),
    ({"token": torch.zeros(4).half()}, TypeError, "advantages is .*expected fp32 or fp64"),
    ({"old": torch.zeros(4, device="meta")}, ValueError, "on one device"),
    ({"cu": torch.zeros(2, dtype=torch.int32, device="meta")}, ValueError, "on one device"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG)
def test_wrong_inputs_are_named(partials, change, error, message):
    inputs = {"new": torch.zeros(4), "old": torch.zeros(4), "mask": torch.ones(4), "cu": bounds(4), "entropy": None}
    inputs = inputs | {"token": None} | change
    with pytest.raises(error, match=message):
        partials(*inputs.values())


@pytest.mark.parametrize("forward", [pytest.param(OPS.gspo_forward, marks=native), reference.gspo_forward])
def test_wrong_inputs_of_the_loss_are_named(forward):
    new, mask, cu, two = torch.zeros(4), torch.ones(4), bounds(2, 2), torch.ones(2)
    table = torch.ones(2, 6, dtype=torch.float64)

    def call(table=table, advantages=two, denominator=1.0, cu=cu):
        return forward(new, table, advantages, mask, cu, 0.1, 0.1, denominator, 3.0)

    call()
    for wrong in ({"table": table[:1]}, {"advantages": torch.ones(4)}, {"table": table[:, :5]}):
        with pytest.raises(ValueError, match="partials has shape"):
            call(**wrong)
    with pytest.raises(ValueError, match=r"advantages has shape \[3\]"):
        call(advantages=torch.ones(3))
    with pytest.raises(TypeError, match="partials is"):
        call(table=table.float())
    with pytest.raises(ValueError, match="denominator = 0.*must be positive"):
        call(denominator=0.0)
    with pytest.raises(ValueError, match="ends at 9"):
        call(cu=bounds(2, 7))
