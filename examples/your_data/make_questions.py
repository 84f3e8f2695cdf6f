"""Questions in GSM8K's form, small enough for a laptop: `python examples/your_data/make_questions.py`.

Each line of questions.jsonl is {"question": ..., "answer": ...}; the answer ends with "#### " and the number, as in
GSM8K. A data set of your own takes its place.
"""

import json
import random
from pathlib import Path

import tyro

NAMES = ("Ann", "Ben", "Eva", "Jon", "Kim", "Lea", "Max", "Tom")
THINGS = ("apples", "books", "cards", "coins", "pens", "shells")


def main(output: Path = Path("questions.jsonl"), rows: int = 3000, seed: int = 1) -> None:
    """Write questions.

    Args:
        output: File to write, over an older one.
        rows: Questions, no two of them equal.
        seed: Another one gives other questions.
    """
    generator = random.Random(seed)
    found: dict[str, str] = {}
    while len(found) < rows:
        name, things = generator.choice(NAMES), generator.choice(THINGS)
        first, second = generator.randint(1, 19), generator.randint(1, 19)
        question = f"{name} has {first} {things} and gets {second} more. How many {things} has {name}?"
        found[question] = f"{first} + {second} = {first + second}\n#### {first + second}"
    lines = (json.dumps({"question": question, "answer": answer}) for question, answer in found.items())
    output.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"{output}: {rows} questions")


if __name__ == "__main__":
    tyro.cli(main)
