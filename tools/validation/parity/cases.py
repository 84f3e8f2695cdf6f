"""What is compared: parallel layouts, and a pairwise cover of how a step can be cut and computed in them.

Pairwise: for every two factors, each pair of their values that can go together does so in some case. Faults of such
systems mostly need two things at once (a layout and padding, recomputation and virtual stages), and the full product
would take an hour.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, product

from gspo_megatron.config import Layout
from tools.validation.parity.fixture import GROUPS, PAIRS

NUM_SEQUENCES = sum(len(group) for group in GROUPS)
CHUNK_TOKENS = 13  # of the chunked head: divides nothing


@dataclass(frozen=True)
class NamedLayout:
    """How the ranks are cut. What the sizes leave over is data parallelism."""

    name: str
    ranks: int
    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    virtual: int | None = None
    expert: int = 1
    expert_tensor: int = 1
    distributed_optimizer: bool = False

    @property
    def data(self) -> int:
        return self.ranks // (self.tensor * self.context * self.pipeline)

    @property
    def parallel(self) -> Layout:
        return Layout(
            self.tensor,
            self.pipeline,
            self.virtual,
            self.expert,
            self.expert_tensor,
            self.distributed_optimizer,
            self.context,
        )


# Sequence parallelism is always on with TP. EP takes its ranks from data, context and tensor ranks; ZeRO: the
# distributed optimizer.
LAYOUTS = (
    NamedLayout("one rank", 1),
    NamedLayout("DP2", 2),
    NamedLayout("DP2 ZeRO", 2, distributed_optimizer=True),
    NamedLayout("TP2", 2, tensor=2),
    NamedLayout("TP2 EP2", 2, tensor=2, expert=2),
    NamedLayout("TP2 ETP2", 2, tensor=2, expert_tensor=2),
    NamedLayout("PP2", 2, pipeline=2),
    NamedLayout("PP2 VP2", 2, pipeline=2, virtual=2),
    NamedLayout("CP2", 2, context=2),
    NamedLayout("DP2 EP2", 2, expert=2),
    NamedLayout("DP4", 4),
    NamedLayout("DP4 EP4", 4, expert=4),
    NamedLayout("DP4 EP2 ZeRO", 4, expert=2, distributed_optimizer=True),
    NamedLayout("TP4", 4, tensor=4),
    NamedLayout("TP2 DP2", 4, tensor=2),
    NamedLayout("TP2 PP2", 4, tensor=2, pipeline=2),
    NamedLayout("TP2 EP2 PP2", 4, tensor=2, pipeline=2, expert=2),
    NamedLayout("TP2 ETP2 PP2", 4, tensor=2, pipeline=2, expert_tensor=2),
    NamedLayout("PP4", 4, pipeline=4),
    NamedLayout("PP2 VP2 DP2 EP2", 4, pipeline=2, virtual=2, expert=2),
    NamedLayout("CP4", 4, context=4),
    NamedLayout("CP2 PP2", 4, context=2, pipeline=2),
    NamedLayout("CP2 TP2", 4, context=2, tensor=2),
    NamedLayout("CP2 DP2 EP4 ZeRO", 4, context=2, expert=4, distributed_optimizer=True),
)
BY_NAME = {layout.name: layout for layout in LAYOUTS}


@dataclass(frozen=True)
class Case:
    """One step in one layout."""

    layout: NamedLayout
    algorithm: str = "gspo"
    microbatches: int = 2  # of each replica
    padded: bool = False
    recompute: bool = False
    chunked: bool = False  # log-probs from hidden states, CHUNK_TOKENS at a time
    dtype: str = "fp32"
    tied: bool = False
    temperature: float = 1.0

    @property
    def options(self) -> str:
        """What the table has no column for."""
        words = ["tied embeddings"] if self.tied else []
        return ", ".join(words + ([f"temperature {self.temperature:g}"] if self.temperature != 1 else []))

    @property
    def name(self) -> str:
        words = [self.layout.name, f"m{self.microbatches}", "padded" if self.padded else "packed"]
        words += ["recompute"] * self.recompute + ["chunked"] * self.chunked + [self.algorithm, self.dtype]
        return " ".join(words + ([self.options] if self.options else []))


def microbatches(layout: NamedLayout) -> tuple[int, int, int]:
    """The interleaved schedule wants a multiple of PP."""
    return (2, 4, 6) if layout.virtual else (1, 2, 5)


def is_legal(case: Case) -> bool:
    """Every microbatch of every replica holds a sequence (a pair)."""
    items = len(PAIRS) if case.algorithm == "dpo" else NUM_SEQUENCES
    return case.microbatches in microbatches(case.layout) and case.microbatches * case.layout.data <= items


def pairwise(factors: dict[str, Sequence], legal: Callable[[dict], bool]) -> list[dict]:
    """A small list of legal choices, one value a factor, in which each legal pair of values occurs. Greedy: always the
    choice with the most new pairs, the first of equals, so that the answer is the same every time."""
    names = list(factors)
    choices = [dict(zip(names, values, strict=True)) for values in product(*factors.values())]
    choices = [choice for choice in choices if legal(choice)]
    pairs = [{((a, c[a]), (b, c[b])) for a, b in combinations(names, 2)} for c in choices]
    missing, chosen = set().union(*pairs), []
    while missing:
        best = max(range(len(choices)), key=lambda i: (len(pairs[i] & missing), -i))
        missing -= pairs[best]
        chosen.append(choices[best])
    return chosen


def cover(layouts: Sequence[NamedLayout], algorithms: Sequence[str], **fixed) -> list[Case]:
    """Pairwise over layout, microbatches, padding, recomputation, head and algorithm."""
    factors = {
        "layout": layouts,
        "microbatches": sorted({m for layout in layouts for m in microbatches(layout)}),
        "padded": (False, True),
        "recompute": (False, True),
        "chunked": (False, True),
        "algorithm": algorithms,
    }
    return [Case(**c, **fixed) for c in pairwise(factors, lambda c: is_legal(Case(**c)))]


def named(*names: str) -> list[NamedLayout]:
    return [BY_NAME[name] for name in names]


def matrix() -> list[Case]:
    """All cases, by number of ranks."""
    cases = cover(LAYOUTS, ("gspo", "gspo_token"))
    others = named("TP2", "PP2", "CP2", "DP4 EP4", "TP2 EP2 PP2", "PP2 VP2 DP2 EP2", "CP2 TP2")
    for number, algorithm in enumerate(("ppo", "dpo", "grpo", "dr_grpo", "dapo")):
        for place, layout in enumerate(others):
            cases.append(_varied(layout, algorithm, number + place))
    for number, layout in enumerate(layout for layout in LAYOUTS if not layout.distributed_optimizer):
        cases.append(_varied(layout, ("gspo", "gspo_token", "grpo")[number % 3], number, dtype="fp64"))
    for number, layout in enumerate(named("PP2", "TP2 PP2", "CP2 PP2", "PP2 VP2 DP2 EP2")):
        cases.append(_varied(layout, "gspo", number, tied=True))
        cases.append(_varied(layout, "gspo", number + 1, dtype="fp64", tied=True))
    for number, layout in enumerate(named("TP2", "CP2", "TP2 EP2 PP2", "DP4 EP4")):
        cases.append(_varied(layout, ("gspo", "ppo")[number % 2], number, temperature=0.7))
    for number, layout in enumerate(named("one rank", "TP2", "CP2", "TP2 EP2 PP2", "DP4 EP4")):
        cases.append(_varied(layout, "gspo", number, dtype="bf16"))
    assert all(is_legal(case) for case in cases)
    return sorted(set(cases), key=lambda case: (case.layout.ranks, LAYOUTS.index(case.layout), cases.index(case)))


def _varied(layout: NamedLayout, algorithm: str, number: int, **fixed) -> Case:
    """The other choices turn with `number`, each at its own pace."""
    allowed = [m for m in microbatches(layout) if is_legal(Case(layout, algorithm, m))]
    return Case(
        layout,
        algorithm,
        allowed[number % len(allowed)],
        padded=number % 2 == 1,
        recompute=number // 2 % 2 == 1,
        chunked=number % 3 == 1,
        **fixed,
    )


def small() -> list[Case]:
    """One case a layout: what every run of the tests compares."""
    turn = ("gspo", "gspo_token", "dpo", "ppo", "gspo", "grpo")
    return [_varied(layout, turn[i % 6], i) for i, layout in enumerate(LAYOUTS)]
