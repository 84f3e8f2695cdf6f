"""Calculations as rows of data: `python examples/environments/make_calculations.py`.

Each line of calculations.jsonl has the messages that ask, the answer, and an episode that finds it with the tools of
examples/environments/calculator.py: {"prompt": [...], "answer": "205", "episode": [...]}.
"""

import json
import random
from pathlib import Path

import tyro

ALL = 90 * 90 * 8  # two numbers of two digits, one of 2 to 9


def main(output: Path = Path("calculations.jsonl"), rows: int = 4000, seed: int = 1) -> None:
    """Write calculations.

    Args:
        output: File to write, over an older one.
        rows: Calculations, no two of them equal.
        seed: Another one gives other calculations.
    """
    if not 1 <= rows <= ALL:
        raise SystemExit(f"error: --rows {rows}: must be between 1 and {ALL}, as many different calculations there are")
    numbers = random.Random(seed)
    found: dict[tuple[int, int, int], dict] = {}
    while len(found) < rows:
        a, b, c = numbers.randint(10, 99), numbers.randint(10, 99), numbers.randint(2, 9)
        found.setdefault((a, b, c), row_of(a, b, c))
    output.write_text("".join(f"{json.dumps(row)}\n" for row in found.values()), encoding="utf-8")
    print(f"{output}: {len(found)} calculations")


def row_of(a: int, b: int, c: int) -> dict:
    """Return the row that asks for (a + b) * c."""
    total = a + b
    episode = [
        {"role": "assistant", "content": call("add", a, b)},
        {"role": "tool", "name": "add", "content": str(total)},
        {"role": "assistant", "content": call("multiply", total, c)},
        {"role": "tool", "name": "multiply", "content": str(total * c)},
        {"role": "assistant", "content": str(total * c)},
    ]
    asked = [{"role": "user", "content": f"What is ({a} + {b}) * {c}?"}]
    return {"prompt": asked, "answer": str(total * c), "episode": episode}


def call(name: str, a: int, b: int) -> str:
    """Return a call of a tool, as the model is to write it."""
    return f"<tool_call>{json.dumps({'name': name, 'arguments': {'a': a, 'b': b}})}</tool_call>"


if __name__ == "__main__":
    tyro.cli(main)
