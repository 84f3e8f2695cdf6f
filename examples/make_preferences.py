"""Preference pairs from a recipe's tasks: `python examples/make_preferences.py examples/recipes/moe_dpo.yaml`.

The chosen answer is the task's gold answer. The rejected one is the same with one or two characters changed, so often
that the task's own scorer takes marks off: a policy must look at the answer, not at its length or style, to tell them
apart. No question appears twice, so that pairs held out from the file are never trained on.
"""

import json
import random
import string
import sys
from pathlib import Path
from typing import Annotated

import tyro

from gspo_megatron.batch import TaskItem
from gspo_megatron.errors import GspoError
from gspo_megatron.recipe.load import load_recipe
from gspo_megatron.tasks.isolation import ScoringProcess
from gspo_megatron.tasks.mixture import TaskMixture

TRIES = 20  # corruptions of one answer before the question is given up
KINDS = (string.digits, string.ascii_lowercase, string.ascii_uppercase)


def main(
    recipe: Annotated[Path, tyro.conf.Positional],
    output: Path | None = None,
    count: int = 4000,
    split: Annotated[str, tyro.conf.arg(metavar="train|warm_start")] = "train",
    seed: int = 1,
) -> int:
    """Write pairs of a gold and a corrupted answer as JSONL: {"prompt": ..., "chosen": ..., "rejected": ...}.

    Args:
        recipe: Its `tasks` and `seed` say which questions are asked.
        output: File to write, over an older one. Default: algorithm.preference.path of the recipe.
        count: Pairs.
        split: Of the questions. train: fresh ones; warm_start: those of the supervised phase. Never the held-out ones.
        seed: Of the corruptions.
    """
    try:
        config = load_recipe([str(recipe)])
        target = output or config.algorithm.preference.path
        if target is None or count < 1 or split not in ("train", "warm_start"):
            print("error: give --output, a --count of 1 or more and a --split of train or warm_start", file=sys.stderr)
            return 2
        mixture = TaskMixture(config.tasks, config.seed, ScoringProcess(config.faults))
        rows = pairs(mixture, split, count, random.Random(seed))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    except (GspoError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{target}: {len(rows)} pairs")
    return 0 if len(rows) == count else 1


def pairs(mixture: TaskMixture, split: str, count: int, generator: random.Random) -> list[dict[str, str]]:
    """Up to `count` pairs of distinct questions; fewer, and a word about it, where the tasks run out of questions."""
    rows: dict[str, dict[str, str]] = {}
    for index in range(20 * count):
        item = mixture.item(split, index)
        rejected = None if item.question in rows or not item.answer else corrupted(mixture, item, generator)
        if rejected is not None:
            rows[item.question] = {"prompt": item.question, "chosen": mixture.gold_response(item), "rejected": rejected}
        if len(rows) == count:
            break
    else:
        print(f"warning: {20 * count} draws gave {len(rows)} questions of {count}", file=sys.stderr)
    return list(rows.values())


def corrupted(mixture: TaskMixture, item: TaskItem, generator: random.Random) -> str | None:
    """The gold answer with a change that costs marks; None where none was found."""
    for _ in range(TRIES):
        text = edited(mixture.gold_response(item), generator)
        if generator.random() < 0.5:
            text = edited(text, generator)
        if (
            text.strip()
            and text != mixture.gold_response(item)
            and not mixture.is_correct(item, mixture.score(item, text))
        ):
            return text
    return None


def edited(text: str, generator: random.Random) -> str:
    """One character replaced by another of its kind, dropped, doubled, or swapped with the next."""
    place = generator.randrange(len(text))
    old, rest = text[place], text[place + 1 :]
    kind = next((kind for kind in KINDS if old in kind), string.ascii_lowercase)
    edits = [generator.choice(kind) + rest, old + old + rest]
    if len(text) > 1:
        edits.append(rest)
    if rest:
        edits.append(rest[0] + old + rest[1:])
    return text[:place] + generator.choice(edits)


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
