"""`gspo-megatron data` shows a recipe's prompts as the model will see them. It trains nothing."""

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gspo_megatron.config.constraints import require
from gspo_megatron.config.options import check_options
from gspo_megatron.recipe.load import load_recipe

if TYPE_CHECKING:
    from gspo_megatron.data.preview import Lengths, Preview, Shown

PROGRAM = "gspo-megatron data"


@dataclass(frozen=True)
class Options:
    """Show prompts of a recipe as the model will see them: text, tokens, what of an example is trained, how long they
    are, what is left out, and what is both trained on and held out. Overrides of the recipe may follow."""

    recipe: tyro.conf.Positional[Path]
    """Recipe file."""
    rows: int = 2
    """Prompts of each task to show."""
    split: Literal["train", "warm_start", "eval"] = "train"
    """Where they are from."""
    tokens: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Show where one token ends and the next begins."""


def main(argv: list[str]) -> int:
    """Run the command. Returns the exit status 0.

    Raises:
        ConfigError: the recipe, its data or a reward function cannot be used.
        RolloutError: a prompt is too long, and the recipe does not say that it may be left out.
        SystemExit: 0 for --help, 2 for a value of the wrong type.
    """
    options, rest = tyro.cli(Options, prog=PROGRAM, args=argv, return_unknown_args=True)
    check_options(options, recipe="RECIPE")
    require(0 <= options.rows <= 1000, "--rows", options.rows, "must be 0 to 1000", "Give 2.")
    config = load_recipe([str(options.recipe), *rest], program=PROGRAM)
    from gspo_megatron.data.preview import preview

    _print(preview(config, options.rows, options.split), options.tokens)
    return 0


def _print(found: "Preview", with_tokens: bool) -> None:
    console = Console(highlight=False, soft_wrap=True)
    for note in found.notes:
        console.print(Text(note))
    console.print(_table(found.lengths))
    for shown in found.shown:
        console.print(_prompt(shown, with_tokens))


def _table(lengths: "list[Lengths]") -> Table:
    table = Table(title="tokens of a prompt, chat template included (of the first 1,000)")
    for name in ("task", "split", "rows", "shortest", "median", "95 %", "longest"):
        table.add_column(name, justify="left" if name in ("task", "split") else "right")
    for one in lengths:
        rows = "endless" if one.rows is None else f"{one.rows:,}"
        table.add_row(one.task, one.split, rows, *(str(one.at(share)) for share in (0.0, 0.5, 0.95, 1.0)))
    return table


def _prompt(shown: "Shown", with_tokens: bool) -> Text:
    """The prompt, then its gold answer with the trained parts marked, each token behind a bar where tokens are
    wanted."""
    bar = "|" if with_tokens else ""
    text = Text("\n")
    text.append(f"{shown.item.task}: {len(shown.prompt)} tokens", style="bold")
    trained = sum(shown.is_trained)
    text.append(f", and {trained} trained in the warm start\n" if shown.response else "\n", style="bold")
    text.append(bar.join(shown.prompt), style="dim")
    for is_trained, run in groupby(zip(shown.response, shown.is_trained, strict=True), lambda pair: pair[1]):
        part = bar.join(token for token, _ in run)
        text.append(f"{bar}[trained]{part}[/trained]" if is_trained else bar + part, "green" if is_trained else "dim")
    return text
