"""`gspo-megatron doctor --noise-floor`: its options, what each row means for a recipe, and the printed table.

The sequence ratio's clip range is 3e-4, so whatever moves log s at unchanged weights by that much decides clips
instead of the policy. The measurements are in noise_floor.py; here nothing imports torch, so that a bad command line is
answered at once.

Left out: other examinations (memory, speed, the network between ranks), and a fit of how the noise falls with length.
"""

import dataclasses
import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from gspo_megatron.check import check_layout
from gspo_megatron.config import ParallelConfig, TrainConfig, require
from gspo_megatron.config_algorithm import SEQUENCE_RATIO
from gspo_megatron.errors import ConfigError

PROGRAM = "gspo-megatron doctor --noise-floor [RECIPE.yaml]"
PLAIN_WIDTH = 130  # columns of the table where standard output is no terminal


@dataclass(frozen=True)
class Options:
    """How far log s = mean over a response of (logp_a - logp_b) is from 0 while the weights stay what they are.

    Behind these options come the recipe and its overrides, as for train: [RECIPE.yaml] [--some.override VALUE ...].
    Exit status 0: every row that training with this recipe relies on is below epsilon / 3; 1: one is not; 2: bad input.
    """

    noise_floor: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Measure the noise floor of the sequence ratio (the one examination there is; it must be asked for)."""
    num_prompts: int = 32
    """Prompts of the recipe to sample responses to, rollout.group_size each, over all replicas."""
    checkpoint: Path | None = None
    """Folder of a checkpoint (runs/NAME/checkpoints/step_NNNNNN). None: the recipe's initial weights, random."""
    json: Path | None = None
    """Write the table to this file as well."""


@dataclass(frozen=True)
class Row:
    """The spread of one comparison. Without numbers it was not measured, and `compared` says why."""

    key: str  # of ROWS
    compared: str
    rms: float | None = None
    max: float | None = None


@dataclass(frozen=True)
class NoiseFloor:
    """What the ranks measured."""

    rows: list[Row]
    layout: str
    device: str
    num_responses: int
    mean_length: float  # trained tokens a response


@dataclass(frozen=True)
class RowKind:
    """What a row compares, and what to do when it is too large."""

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
}  # fmt: skip


@dataclass(frozen=True)
class Diagnosis:
    """The measurements beside one recipe's clip range."""

    measured: NoiseFloor
    epsilon: float  # the smaller of the two clip ranges
    weights: str
    params_dtype: str
    algorithm: str
    old_logprobs: str
    relied_on: tuple[str, ...] = field(default=())

    @property
    def limit(self) -> float:
        """A third of epsilon: beyond it noise decides a share of the clips that one sees."""
        return self.epsilon / 3

    def is_above(self, row: Row) -> bool:
        """Not a number counts as above."""
        return row.rms is not None and not row.rms <= self.limit

    @property
    def is_healthy(self) -> bool:
        """Every row that training relies on was measured and is below the limit."""
        return not any(r.key in self.relied_on and (r.rms is None or self.is_above(r)) for r in self.measured.rows)

    def advice(self) -> list[str]:
        """A sentence for each row above the limit."""
        return [
            f"({row.key}) is above epsilon / 3{'' if row.key in self.relied_on else ' (not used by this recipe)'}: "
            f"{ROWS[row.key].remedy}."
            for row in self.measured.rows if self.is_above(row)
        ]  # fmt: skip

    def as_dict(self) -> dict:
        """For --json; a number that is not finite becomes its name, because JSON has none."""
        rows = [
            dataclasses.asdict(row) | {
                "title": ROWS[row.key].title, "rms_over_epsilon": None if row.rms is None else row.rms / self.epsilon,
                "relied_on": row.key in self.relied_on, "above_limit": self.is_above(row),
            }
            for row in self.measured.rows
        ]  # fmt: skip
        rows = [{name: _plain(value) for name, value in row.items()} for row in rows]
        rest = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("measured",)}
        about = {k: v for k, v in dataclasses.asdict(self.measured).items() if k != "rows"}
        return about | rest | {"limit": self.limit, "healthy": self.is_healthy, "advice": self.advice(), "rows": rows}


def parse(argv: list[str], quiet: bool) -> tuple[Options, list[str]]:
    """The doctor's own options, and what is left for recipe.load.

    Raises:
        ConfigError: no examination was asked for, or there is no complete checkpoint at --checkpoint.
        SystemExit: 0 for --help, 2 for a value of the wrong type.
    """
    options, rest = tyro.cli(
        Options, prog=PROGRAM, args=argv, return_unknown_args=True, console_outputs=not quiet
    )  # fmt: skip
    require(options.noise_floor, "--noise-floor", options.noise_floor, "says what to examine, and is the only choice",
            f"usage: {PROGRAM} [--some.override VALUE ...]; --help lists the options.")  # fmt: skip
    require(options.num_prompts > 0, "--num-prompts", options.num_prompts, "must be above 0", "Give 32.")
    folder = options.checkpoint
    require(folder is None or (folder / "metadata.json").is_file(), "--checkpoint", str(folder),
            "no complete checkpoint", "Give a folder named step_NNNNNN of a run.")  # fmt: skip
    target = options.json
    require(target is None or target.resolve().parent.is_dir(), "--json", str(target), "its folder does not exist",
            "Make the folder first.")  # fmt: skip
    return options, rest


def check_algorithm(config: TrainConfig) -> None:
    """Raise ConfigError where there is nothing to measure."""
    require(config.algorithm.name != "dpo", "algorithm.name", "dpo", "has no ratio of old and new log-probs",
            "There is nothing to measure; give the recipe of another algorithm.")  # fmt: skip


def check_prompts(options: Options, data: int) -> None:
    """Raise ConfigError for prompts that replicas cannot share.

    Args:
        data: data x context parallel ranks of the resolved layout: replicas that sample on their own.
    """
    require(options.num_prompts % data == 0, "--num-prompts", options.num_prompts,
            f"cannot be divided evenly over {data} replicas (ranks / tensor / pipeline)",
            f"Give a multiple of {data}.")  # fmt: skip


def relied_on(config: TrainConfig) -> tuple[str, ...]:
    """Rows whose noise is part of the ratio when this recipe trains.

    Old log-probs of the training engine are computed on the very batches of the update, so only (a) enters; those of
    the rollout bring (e). A single minibatch that takes its own forward's has a ratio of 1 by construction.
    """
    algorithm = config.algorithm
    if algorithm.old_logprobs == "rollout":
        return ("e",)
    if algorithm.old_logprobs == "first_minibatch" and algorithm.num_minibatches == 1:
        return ()
    return ("a",)


def tensor_counterpart(config: TrainConfig, layout: ParallelConfig, world_size: int) -> ParallelConfig | str:
    """The layout with tensor parallel size 2 where it is 1, else with 1; in words why there is none."""
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


def diagnose(measured: NoiseFloor, options: Options, config: TrainConfig) -> Diagnosis:
    """`config`: resolved."""
    algorithm = config.algorithm
    return Diagnosis(
        measured=measured, epsilon=min(algorithm.clip_ratio_low, algorithm.clip_ratio_high),
        weights=f"checkpoint {options.checkpoint}" if options.checkpoint else "initial (random)",
        params_dtype=config.model.params_dtype, algorithm=algorithm.name, old_logprobs=algorithm.old_logprobs,
        relied_on=relied_on(config),
    )  # fmt: skip


def report(diagnosis: Diagnosis, options: Options, console: Console | None = None) -> None:
    """Print the table, and write --json. Rank 0 only."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, PLAIN_WIDTH)
    measured = diagnosis.measured
    console.print(
        f"Noise floor of log s at unchanged weights: {measured.num_responses} responses of "
        f"{measured.mean_length:.1f} tokens on average.\n"
        f"Weights: {diagnosis.weights}. Type: {diagnosis.params_dtype}. {measured.device}, {measured.layout}.\n"
        f"Recipe: {diagnosis.algorithm}, old_logprobs = {diagnosis.old_logprobs}."
    )
    if diagnosis.algorithm not in SEQUENCE_RATIO:
        console.print("Its ratio is by token: rows are means over a response, and one token's spread is larger.")
    if not options.checkpoint:
        console.print("Random weights spread their probability evenly; give --checkpoint for those of a trained model.")
    console.print(_table(diagnosis))
    for sentence in diagnosis.advice():
        console.print(sentence, style="yellow")
    console.print(_verdict(diagnosis), style="bold green" if diagnosis.is_healthy else "bold red")
    if options.json:
        options.json.write_text(json.dumps(diagnosis.as_dict(), indent=2) + "\n", encoding="utf-8")


def _table(diagnosis: Diagnosis) -> Table:
    table = Table()
    for title, justify in (("", "left"), ("compared", "left"), ("rms", "right"), ("max", "right"),
                           ("epsilon", "right"), ("rms/eps", "right"), ("this recipe", "left"),
                           ("verdict", "left")):  # fmt: skip
        table.add_column(title, justify=justify, no_wrap=title not in ("compared", "verdict"))
    for row in diagnosis.measured.rows:
        use = "relies on it" if row.key in diagnosis.relied_on else "for information"
        if row.rms is None:
            numbers, verdict = ["-", "-", f"{diagnosis.epsilon:.1e}", "-"], "not measured"
        else:
            ratio = row.rms / diagnosis.epsilon
            numbers = [f"{row.rms:.1e}", f"{row.max:.1e}", f"{diagnosis.epsilon:.1e}", f"{ratio:.2g}"]
            verdict = "above eps/3" if diagnosis.is_above(row) else "below eps/3"
        reason = "not measured: " if row.rms is None else ""
        table.add_row(f"({row.key})", f"{ROWS[row.key].title}\n{reason}{row.compared}", *numbers, use, verdict)
    return table


def _verdict(diagnosis: Diagnosis) -> str:
    if not diagnosis.relied_on:
        return "Healthy: with one minibatch and its own log-probs the ratio is 1 by construction."
    rows = ", ".join(f"({key})" for key in diagnosis.relied_on)
    if diagnosis.is_healthy:
        return f"Healthy: this recipe relies on {rows}, which is below epsilon / 3 = {diagnosis.limit:.1e}."
    return f"Too noisy: this recipe relies on {rows}, which is above epsilon / 3 = {diagnosis.limit:.1e}."


def _plain(value: object) -> object:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
