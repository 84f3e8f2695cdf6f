"""The noise floor has rows: records, what each means for a recipe, and what to do where one is too large.

The sequence ratio's clip range is 3e-4, so whatever moves log s at unchanged weights by that much decides clips
instead of the policy. The measurements are in noise_floor.py; here nothing imports torch, so that a bad command line is
answered at once.

Left out: a fit of how the noise falls with length.
"""

import dataclasses
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

from gspo_megatron.config import Layout, ResolvedConfig, TrainConfig
from gspo_megatron.errors import ConfigError
from gspo_megatron.recipe.check import needs_whole_pass
from gspo_megatron.recipe.layout import check_layout


@dataclass(frozen=True)
class Row:
    """This is the spread of one comparison. Without numbers it was not measured, and `compared` says why."""

    key: str  # of ROWS
    compared: str
    rms: float | None = None
    max: float | None = None


@dataclass(frozen=True)
class NoiseFloor:
    """This is what the ranks measured."""

    rows: list[Row]
    layout: str
    device: str
    num_responses: int
    mean_length: float  # trained tokens a response


@dataclass(frozen=True)
class RowKind:
    """Says what a row compares, and what to do when it is too large."""

    title: str
    remedy: str


_SAME_PACKING = (
    "keep the packing between old log-probs and update, as algorithm.old_logprobs = recomputed does: the microbatches "
    "that were filled are the ones that are learned from"
)


ROWS = {
    "a": RowKind(
        "same batches twice",
        "the same batches at the same weights do not repeat, so no choice of old_logprobs helps: look for sums in no "
        "fixed order (on CUDA, Megatron adds expert outputs by atomics where a token has more than two experts) and "
        "try model.params_dtype fp32",
    ),
    "b": RowKind("other packing", _SAME_PACKING),
    "c": RowKind("more microbatches", _SAME_PACKING),
    "d": RowKind(
        "other tensor parallel size",
        "compute old log-probs and the update in one layout; a run that goes on in another layout must start with "
        "fresh rollouts",
    ),
    "e": RowKind(
        "rollout against training engine",
        "give algorithm.old_logprobs recomputed, so that both sides of the ratio come from the training engine; the "
        "gap that is left between the engines is for algorithm.mismatch.correction",
    ),
    "f": RowKind(
        "bf16 against fp32 body",
        "in bf16 the model's body is this far from fp32 at the same weights. It cancels only while old log-probs "
        "come from the same engine, packing and type as the update (old_logprobs = recomputed). More tokens a response "
        "average it out, the router stays in fp32 (model.moe_router_dtype); else train in fp32",
    ),
}  # fmt: skip  # fmt: skip


@dataclass(frozen=True)
class Diagnosis:
    """Puts the measurements beside one recipe's clip range."""

    measured: NoiseFloor
    epsilon: float  # the smaller of the two clip ranges
    weights: str
    params_dtype: str
    algorithm: str
    old_logprobs: str
    relied_on: tuple[str, ...] = field(default=())

    @property
    def limit(self) -> float:
        """Return a third of epsilon: beyond it noise decides a share of the clips that one sees."""
        return self.epsilon / 3

    def is_above(self, row: Row) -> bool:
        """Not a number counts as above."""
        return row.rms is not None and not row.rms <= self.limit

    @property
    def is_healthy(self) -> bool:
        """Every row that training relies on was measured and is below the limit."""
        return not any(r.key in self.relied_on and (r.rms is None or self.is_above(r)) for r in self.measured.rows)

    def advice(self) -> list[str]:
        """Return a sentence for each row above the limit."""
        return [
            f"({row.key}) is above epsilon / 3{'' if row.key in self.relied_on else ' (not used by this recipe)'}: "
            f"{ROWS[row.key].remedy}."
            for row in self.measured.rows
            if self.is_above(row)
        ]

    def as_dict(self) -> dict:
        """Return what --json writes; a number that is not finite becomes its name, because JSON has none."""
        rows = [
            dataclasses.asdict(row)
            | {
                "title": ROWS[row.key].title,
                "rms_over_epsilon": None if row.rms is None else row.rms / self.epsilon,
                "relied_on": row.key in self.relied_on,
                "above_limit": self.is_above(row),
            }
            for row in self.measured.rows
        ]
        rows = [{name: _plain(value) for name, value in row.items()} for row in rows]
        rest = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("measured",)}
        about = {k: v for k, v in dataclasses.asdict(self.measured).items() if k != "rows"}
        return about | rest | {"limit": self.limit, "healthy": self.is_healthy, "advice": self.advice(), "rows": rows}


def relied_on(config: TrainConfig) -> tuple[str, ...]:
    """Return the rows whose noise is part of the ratio when this recipe trains.

    Old log-probs of the training engine are computed on the very batches of the update, so only (a) enters; those of
    the rollout bring (e). A single minibatch that takes its own forward's has a ratio of 1 by construction.
    """
    algorithm = config.algorithm
    if algorithm.old_logprobs == "rollout":
        return ("e",)
    if algorithm.num_minibatches == 1 and not needs_whole_pass(config):
        return ()
    return ("a",)


def tensor_counterpart(config: TrainConfig, layout: Layout, world_size: int) -> Layout | str:
    """Return the layout with tensor parallel size 2 where it is 1, else with 1; in words why there is none."""
    if world_size == 1:
        return "tensor parallelism needs 2 ranks; start with NPROC=2"
    size = 2 if layout.tensor_model_parallel_size == 1 else 1
    first = replace(layout, tensor_model_parallel_size=size)
    # Pipeline stages add no arithmetic of their own, so they may make room.
    flat = replace(first, pipeline_model_parallel_size=1, virtual_pipeline_model_parallel_size=None)
    reason = ""
    for other in (first, flat):
        try:
            check_layout(config.model, other, world_size)
        except ConfigError as error:
            reason = reason or str(error)
        else:
            return other
    return reason


def diagnose(measured: NoiseFloor, checkpoint: Path | None, config: ResolvedConfig) -> Diagnosis:
    """Put what was measured beside the recipe's clip range.

    Args:
        checkpoint: whose weights they were; None: the initial ones.
    """
    algorithm = config.algorithm
    return Diagnosis(
        measured=measured,
        epsilon=min(algorithm.clip_ratio_low, algorithm.clip_ratio_high),
        weights=f"checkpoint {checkpoint}" if checkpoint else "initial (random)",
        params_dtype=config.model.params_dtype,
        algorithm=algorithm.name,
        old_logprobs=algorithm.old_logprobs,
        relied_on=relied_on(config),
    )


def _plain(value: object) -> object:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
