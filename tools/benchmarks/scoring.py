"""What a reward costs: `python -m tools.benchmarks.scoring` prints milliseconds a response.

Rows: a task whose scorer evaluates nothing; one that evaluates, with text that is data, and with text that raises; one
whose verdict is worked out by sympy. The times are of the rank, from request to reward, medians of 200.
"""

import statistics
import time

from gspo_megatron.config import FaultsConfig, TaskConfig
from gspo_megatron.tasks.isolation import ScoringProcess
from gspo_megatron.tasks.mixture import TaskMixture

ROWS = (
    ("spell_backward", "evaluates nothing", "{}"),
    ("spiral_matrix", "a list", "[1, 2, 3]"),
    ("countdown", "gives no value", "no {} term"),
    ("countdown", "a term", "({})"),
    ("polynomial_multiplication", "an expression", "0 + {}"),
)
REPEATS = 200


def main() -> None:
    process = ScoringProcess(FaultsConfig())
    mixture = TaskMixture({name: TaskConfig() for name, _, _ in ROWS}, 1, process)
    items = {item.task: item for item in (mixture.item("train", index) for index in range(60))}
    print("| task | response | ms |\n| --- | --- | --- |")
    for name, kind, text in ROWS:
        response = text.replace("{}", items[name].answer)
        times = []
        for _ in range(REPEATS + 5):
            began = time.perf_counter()
            mixture.score(items[name], response)
            times.append(1e3 * (time.perf_counter() - began))
        print(f"| {name} | {kind} | {statistics.median(times[5:]):.2f} |")
    process.close()


if __name__ == "__main__":
    main()
