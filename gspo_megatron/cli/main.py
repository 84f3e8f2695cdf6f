"""The command `gspo-megatron` looks up the subcommand, and ends the process as lifecycle.guard says; called with
arguments from Python, it raises instead.

A subcommand is a file of this folder with `main(argv)`; it is imported when it is called, and none imports torch before
its checks have passed. Left out: the subcommands eval, plan and report.
"""

import importlib
import sys

from gspo_megatron.process import lifecycle

USAGE = """\
usage: gspo-megatron train [RECIPE.yaml] [--some.override VALUE ...]
       gspo-megatron data RECIPE.yaml [--rows 2 ...]
       gspo-megatron doctor --noise-floor [RECIPE.yaml] [--some.override VALUE ...]
       gspo-megatron convert SOURCE TARGET [--dtype bf16 ...]
       gspo-megatron upcycle SOURCE TARGET [--experts 8 ...]
       gspo-megatron slurm RECIPE.yaml --nodes N [--some.override VALUE ...]
       gspo-megatron study routing-replay|algorithms [--seeds 5 ...]
       gspo-megatron plot RUN
       gspo-megatron check-learning RUN [RUN ...] [--control RUN]
       torchrun --no-python --nproc-per-node N gspo-megatron train [RECIPE.yaml] [--some.override VALUE ...]

train   train a MoE model with GSPO or one of its relatives; `gspo-megatron train --help` lists every override
data    show a recipe's prompts as the model will see them: text, tokens, mask, lengths, what is left out
doctor  measure how far the sequence ratio is from 1 at unchanged weights, beside the recipe's clip range
convert Hugging Face folder to Megatron checkpoint, or back; `gspo-megatron convert --help` lists the options
upcycle dense Hugging Face folder to a MoE whose experts are copies; `gspo-megatron upcycle --help` lists the options
slurm   write a batch script for a recipe, checked against its nodes; `gspo-megatron slurm --help` lists the options
study   routing-replay: does GSPO need it? algorithms: which learns fastest? each trains arms from the same starts and
        writes a report; `gspo-megatron study --help` tells more
plot    redraw a run's charts from its metrics.jsonl
check-learning  hold finished runs to the learning criteria; exit status 1 where one fails

Without torchrun it starts its own ranks on this machine: one a GPU, 4 on a CPU, or NPROC of them."""

COMMANDS = {
    "train": "gspo_megatron.cli.train",
    "data": "gspo_megatron.cli.data",
    "doctor": "gspo_megatron.cli.doctor",
    "convert": "gspo_megatron.cli.convert",
    "upcycle": "gspo_megatron.cli.upcycle",
    "slurm": "gspo_megatron.cli.slurm",
    "study": "gspo_megatron.cli.study",
    "plot": "gspo_megatron.cli.plot",
    "check-learning": "gspo_megatron.cli.check_learning",
}


def main(argv: list[str] | None = None) -> int:
    """Run a command. Returns the exit status of what ends normally.

    Args:
        argv: the subcommand and what follows it. None: those of this process, which is the command's own: an error
            ends it, with one message and the status (`console`). Given, errors are raised, and the process lives on.

    Raises:
        GspoError: what the command cannot work with; only with `argv`.
        SystemExit: after --help, an unknown subcommand or option, whose message has been printed; only with `argv`.
    """
    return console(sys.argv[1:]) if argv is None else _run(argv)


def console(argv: list[str]) -> int:
    """Run a command in a process of its own, as the console script does; an error ends the process."""
    with lifecycle.guard():
        return _run(argv)


def _run(argv: list[str]) -> int:
    if argv[:1] in (["-h"], ["--help"]):
        if lifecycle.rank() == 0:
            print(USAGE)
        return 0
    if not argv or argv[0] not in COMMANDS:
        problem = f"unknown command {argv[0]!r}" if argv else "no command given"
        if lifecycle.rank() == 0:
            print(f"error: {problem}\n{USAGE}", file=sys.stderr)
        raise SystemExit(lifecycle.BAD_INPUT)
    return importlib.import_module(COMMANDS[argv[0]]).main(argv[1:])
