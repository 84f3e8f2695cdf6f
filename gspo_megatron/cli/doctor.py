"""`gspo-megatron doctor --noise-floor` has its options here, and the printed table.

Left out: other examinations (memory, speed, the network between ranks).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console, JustifyMethod
from rich.table import Table

from gspo_megatron.cli.launch import OF_A_DIAGNOSIS, become_ranks, gpu_count, layout_of
from gspo_megatron.config import TrainConfig
from gspo_megatron.config.algorithm import SEQUENCE_RATIO
from gspo_megatron.config.constraints import require
from gspo_megatron.config.options import check_options
from gspo_megatron.process import lifecycle
from gspo_megatron.recipe import check
from gspo_megatron.recipe.load import load_recipe
from gspo_megatron.recipe.model_folders import require_checkpoint
from gspo_megatron.trainer.diagnostics.rows import ROWS, Diagnosis, diagnose

PROGRAM = "gspo-megatron doctor --noise-floor [RECIPE.yaml]"
PLAIN_WIDTH = 130  # columns of the table where standard output is no terminal


def main(argv: list[str]) -> int:
    """Run the command on this rank, or start the ranks.

    Returns the exit status on every rank: 1 where the recipe relies on something too noisy.
    """
    quiet = lifecycle.rank() != 0
    options, rest = parse(argv, quiet)
    config = load_recipe(rest, quiet, PROGRAM)
    check_algorithm(config)
    layout, world_size = layout_of(config)
    check.check(config, layout, world_size, check.uses_transformer_engine(config, gpu_count() > 0))
    check_prompts(options, world_size // (layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size))
    become_ranks(config, world_size, OF_A_DIAGNOSIS)
    from gspo_megatron.trainer.diagnostics.noise_floor import measure

    measured = measure(config, layout, options.num_prompts, options.checkpoint)
    diagnosis = diagnose(measured, options.checkpoint, config.resolved(layout))
    if not quiet:
        report(diagnosis, options)
    return int(not diagnosis.is_healthy)


@dataclass(frozen=True)
class Options:
    """Measure how far log s = mean over a response of (logp_a - logp_b) is from 0 while the weights stay what they are.

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


def parse(argv: list[str], quiet: bool) -> tuple[Options, list[str]]:
    """Return the doctor's own options, and what is left for recipe.load.

    Raises:
        ConfigError: no examination was asked for, or there is no complete checkpoint at --checkpoint.
        SystemExit: 0 for --help, 2 for a value of the wrong type.
    """
    options, rest = tyro.cli(Options, prog=PROGRAM, args=argv, return_unknown_args=True, console_outputs=not quiet)
    require(
        options.noise_floor,
        "--noise-floor",
        options.noise_floor,
        "says what to examine, and is the only choice",
        f"usage: {PROGRAM} [--some.override VALUE ...]; --help lists the options.",
    )
    check_options(options)
    require(options.num_prompts > 0, "--num-prompts", options.num_prompts, "must be above 0", "Give 32.")
    folder = options.checkpoint
    if folder is not None:
        require_checkpoint(folder, "--checkpoint")
    target = options.json
    require(
        target is None or target.resolve().parent.is_dir(),
        "--json",
        str(target),
        "its folder does not exist",
        "Make the folder first.",
    )
    return options, rest


def check_algorithm(config: TrainConfig) -> None:
    """Raise ConfigError where there is nothing to measure."""
    require(
        config.algorithm.name != "dpo",
        "algorithm.name",
        "dpo",
        "has no ratio of old and new log-probs",
        "There is nothing to measure; give the recipe of another algorithm.",
    )


def check_prompts(options: Options, data: int) -> None:
    """Raise ConfigError for prompts that replicas cannot share.

    Args:
        data: data x context parallel ranks of the resolved layout: replicas that sample on their own.
    """
    require(
        options.num_prompts % data == 0,
        "--num-prompts",
        options.num_prompts,
        f"cannot be divided evenly over {data} replicas (ranks / tensor / pipeline)",
        f"Give a multiple of {data}.",
    )


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
    columns: tuple[tuple[str, JustifyMethod], ...] = (
        ("", "left"),
        ("compared", "left"),
        ("rms", "right"),
        ("max", "right"),
        ("epsilon", "right"),
        ("rms/eps", "right"),
        ("this recipe", "left"),
        ("verdict", "left"),
    )
    for title, justify in columns:
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
