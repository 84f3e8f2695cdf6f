"""Questions of reasoning-gym as rows of data: `python examples/environments/make_questions.py`.

Each line of spelling.jsonl is an entry of the data set, {"question": ..., "answer": ..., "metadata": {...}}, with which
its grader judges answers.
"""

import json
from pathlib import Path

import reasoning_gym
import tyro


def main(output: Path = Path("spelling.jsonl"), rows: int = 3000, seed: int = 1) -> None:
    """Write questions.

    Args:
        output: File to write, over an older one.
        rows: Questions, no two of them equal.
        seed: Another one gives other questions.
    """
    entries = reasoning_gym.create_dataset("spell_backward", seed=seed, size=20 * rows, min_word_len=3, max_word_len=6)
    found: dict[str, dict] = {}
    for entry in entries:
        found.setdefault(entry["question"], entry)
        if len(found) == rows:
            break
    output.write_text("".join(f"{json.dumps(entry)}\n" for entry in found.values()), encoding="utf-8")
    print(f"{output}: {len(found)} questions")


if __name__ == "__main__":
    tyro.cli(main)
