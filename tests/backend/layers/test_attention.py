"""Attention over packed sequences: against the textbook, and the same when context-parallel ranks share the tokens."""

import pytest
import torch
import torch.distributed as dist

from gspo_megatron.backend.layers import ragged
from gspo_megatron.backend.layers.attention import PackedPlan
from gspo_megatron.backend.layers.context_parallel import ContextSplit
from gspo_megatron.backend.layers.ragged import Ragged
from gspo_megatron.backend.layers.softmax import Softmax
from tools.validation.ranks import spawn

HEADS, GROUPS, DIM, SCALE = 4, 2, 8, 0.3
# Padded to a multiple of 8 tokens, as four ranks want; the second sequence is shorter than one chunk a rank.
LENGTHS, PADDED = (13, 3, 40, 8), (16, 8, 40, 8)
SINKS = (0.4, -1.0, 2.0, 0.0)  # one a head; without a scale
FORMS = {"plain": (None, False), "window": (5, False), "sinks": (None, True), "both": (5, True)}


def bounds(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def tensors() -> list[torch.Tensor]:
    """query [T, n, d], key [T, g, d], value [T, g, d] and an upstream gradient [T, n, d], fp64."""
    generator = torch.Generator().manual_seed(4)
    total = sum(PADDED)
    return [
        torch.randn(total, heads, DIM, generator=generator, dtype=torch.float64)
        for heads in (HEADS, GROUPS, GROUPS, HEADS)
    ]


def form(name: str) -> Softmax:
    window, has_sinks = FORMS[name]
    return Softmax(SCALE, window, torch.tensor(SINKS, dtype=torch.float64).requires_grad_() if has_sinks else None)


def results(plan: PackedPlan, rows: torch.Tensor, name: str) -> list[torch.Tensor]:
    """[T/CP, ...]: output and the gradients of query, key and value at these rows, last [n] that of the sinks."""
    query, key, value, upstream = (x[rows] for x in tensors())
    inputs, softmax = [x.clone().requires_grad_() for x in (query, key, value)], form(name)
    out = plan.attend(1, *inputs, softmax)
    if softmax.sinks is not None:
        inputs.append(softmax.sinks)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream)]


def textbook(name: str) -> list[torch.Tensor]:
    """As results(): one softmax a sequence, head and query, of the keys that it sees and of the head's sink."""
    *inputs, upstream = tensors()
    query, key, value = (x.requires_grad_() for x in inputs)
    softmax, outs = form(name), []
    for start, stop in zip(bounds(PADDED), bounds(PADDED)[1:], strict=False):
        for head in range(HEADS):
            group = head // (HEADS // GROUPS)
            for t in range(start, stop):
                first = start if softmax.window is None else max(start, t + 1 - softmax.window)
                logits = SCALE * key[first : t + 1, group] @ query[t, head]
                if softmax.sinks is not None:
                    logits = torch.cat([logits, softmax.sinks[head : head + 1]])
                weights = torch.softmax(logits, 0)[: t + 1 - first]
                outs.append((t, head, weights @ value[first : t + 1, group]))
    out = torch.stack([row for _, _, row in sorted(outs, key=lambda found: found[:2])]).view(query.shape)
    wanted = [query, key, value] + ([softmax.sinks] if softmax.sinks is not None else [])
    return [out.detach(), *torch.autograd.grad(out, wanted, upstream)]


def on_ranks(rank: int, world_size: int) -> dict:
    """What this rank feeds, computes and refuses when all ranks share the tokens, and when pairs of them do."""
    answers = {}
    groups = {size: [dist.new_group(list(range(i, i + size))) for i in range(0, world_size, size)] for size in (2, 4)}
    for size, of_size in groups.items():
        group = of_size[rank // size]
        ragged.SLACK = {2: 0, 4: 4096}[size]  # every length by itself, or all of them together
        plan = PackedPlan.from_cu_seqlens(bounds(PADDED), cp_group=group)
        first, again = ({name: results(plan, plan.rows, name) for name in FORMS} for _ in range(2))
        same = all(torch.equal(a, b) for name in FORMS for a, b in zip(first[name], again[name], strict=True))
        (chunks,) = PackedPlan.from_cu_seqlens(bounds((16,)), cp_group=group).split.chunks
        seen = sum(int((chunk + 1).sum()) for chunk in chunks.positions)
        answers[size] = {"rows": plan.rows, "results": first, "same": same, "seen": seen}
    with pytest.raises(ValueError) as error:
        ContextSplit.zig_zag(bounds(LENGTHS), Ragged.of(torch.tensor(LENGTHS)), groups[4][0])
    return answers | {"error": str(error.value)}


@pytest.fixture(scope="module")
def ranks() -> list[dict]:
    return spawn(on_ranks, 4)


@pytest.mark.parametrize("slack", [0, 4096])
@pytest.mark.parametrize("name", FORMS)
def test_packed_attention_is_the_textbook_s(name, slack, monkeypatch):
    """Output and all gradients in fp64; the sinks' too. Of the lengths 16, 8, 40, 8 each is computed by itself, or all
    are filled up to 40."""
    monkeypatch.setattr(ragged, "SLACK", slack)
    plan = PackedPlan.from_cu_seqlens(bounds(PADDED))
    assert plan.rows is None
    found, expected = results(plan, torch.arange(sum(PADDED)), name), textbook(name)
    assert len(found) == (5 if FORMS[name][1] else 4)
    for ours, theirs in zip(found, expected, strict=True):
        assert float((ours - theirs).abs().max()) < 1e-12


def test_ranks_take_one_chunk_from_the_front_and_one_from_the_back(ranks):
    """16 and 8 tokens over two ranks: chunks of 4, then of 2; and everything is fed once."""
    assert ranks[0][2]["rows"][:12].tolist() == [0, 1, 2, 3, 12, 13, 14, 15, 16, 17, 22, 23]
    assert ranks[1][2]["rows"][:12].tolist() == [4, 5, 6, 7, 8, 9, 10, 11, 18, 19, 20, 21]
    for size in (2, 4):
        fed = torch.cat([ranks[rank][size]["rows"] for rank in range(size)])
        assert torch.equal(fed.sort().values, torch.arange(sum(PADDED)))


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("size", [2, 4])
def test_shared_attention_equals_whole_attention(ranks, size, name):
    """Output and the gradients of query, key and value in fp64, ragged lengths and grouped queries. The sinks'
    gradient is the sum of the ranks'."""
    whole = results(PackedPlan.from_cu_seqlens(bounds(PADDED)), torch.arange(sum(PADDED)), name)
    for rank in range(4):
        mine = ranks[rank][size]
        for ours, reference in zip(mine["results"][name][:4], whole, strict=False):
            assert float((ours - reference[mine["rows"]]).abs().max()) < 1e-12
        assert mine["same"]  # bit for bit, when computed again
    if FORMS[name][1]:
        total = sum(ranks[rank][size]["results"][name][4] for rank in range(size))
        assert float((total - whole[4]).abs().max()) < 1e-12


@pytest.mark.parametrize("size", [2, 4])
def test_every_rank_does_the_same_work(ranks, size):
    """Query-key pairs of a sequence of 16: 136, of which each rank has its share."""
    assert [ranks[rank][size]["seen"] for rank in range(size)] == [136 // size] * size


def test_a_sequence_that_cannot_be_cut_is_refused(ranks):
    assert "sequences of [13, 3, 40, 8] tokens" in ranks[0]["error"] and "multiple of 8" in ranks[0]["error"]
