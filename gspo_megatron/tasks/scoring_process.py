"""The program in which scorers run: one child process of each rank that scores, with limits on time and memory.

A response is text that a model wrote. Here it is only read: where a scorer hands it to eval() or to sympy's parse_expr,
its code is run with others in their place, which have the text evaluated in a process of its own (evaluation.py) and
give back its value. The verdict is computed here, of values, by the task's own code. What would evaluate text here
all the same (a scorer that does so in a helper's code) is refused.

The process has nothing of the trainer's environment, may not grow beyond its memory limit, changes no file and
connects nowhere (walls.py), and the kernel ends it when one response takes too long, even if the rank that asked is
gone. Requests come pickled from the rank; an answer is one line of JSON.

Nothing of torch or Megatron is imported, so the process is up in a second. The rank's side is isolation.py.
"""

import importlib
import json
import math
import os
import pickle
import signal
import struct
import sys
import types
from collections.abc import Callable
from typing import Any, BinaryIO

import sympy

from gspo_megatron.tasks import walls
from gspo_megatron.tasks.evaluation import Evaluator

LENGTH = struct.Struct("<I")  # before each request
# They run code that they write themselves.
GENERATORS = ("collections", "dataclasses", "sympy.polys.monomials")
UNWALLED = "PermissionError: a scorer evaluates text beside score_answer's own eval() or parse_expr(), where no wall is"
MARGIN = 0.5  # seconds that the scorer's own code may go on after the text's evaluation was ended


def main(memory: int, seconds: float) -> None:
    """Answer requests until stdin ends.

    Args:
        memory: bytes of address space.
        seconds: that one request may take.
    """
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(0, 1)  # what a scorer prints is no answer
    walls.fence(memory)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, also inside C code
    sys.dont_write_bytecode = True
    scorers = Scorers(Evaluator())  # before the first request, so that its server holds no gold answer
    while (request := _read(requests)) is not None:
        signal.setitimer(signal.ITIMER_REAL, seconds + MARGIN)
        print(json.dumps(scorers.answer(seconds, *request)), file=answers, flush=True)
        signal.setitimer(signal.ITIMER_REAL, 0.0)


def _read(requests: BinaryIO) -> tuple | None:
    head = requests.read(LENGTH.size)
    return pickle.loads(requests.read(*LENGTH.unpack(head))) if head else None


class Scorers:
    """The tasks' own scorers, by name of the task, with an evaluator in place of eval() and parse_expr."""

    def __init__(self, evaluator: Evaluator):
        # Not at the top: the evaluator's server is forked without it, and a smaller process forks faster.
        self._create_dataset = importlib.import_module("reasoning_gym.factory").create_dataset
        self._evaluator = evaluator
        self._known: dict[str, tuple[Callable[[str, dict], float], bool]] = {}
        self._is_scoring, self._source = False, ""
        sys.addaudithook(self._refuse)

    def answer(self, seconds: float, spec: dict, text: str, entry: dict) -> dict:
        """Return {"score": a number} or {"error": what the scorer raised, or what became of the text}."""
        self._evaluator.failure = None
        try:
            if spec["name"] not in self._known:
                dataset = self._create_dataset(**spec)
                is_librarys = type(dataset).__module__.startswith("reasoning_gym.")
                self._known[spec["name"]] = (_rebound(dataset, self._evaluator), is_librarys)
            scorer, is_librarys = self._known[spec["name"]]
            self._evaluator.begin(entry if is_librarys else {}, seconds)  # data of other tasks may be anybody's
            self._is_scoring = True
            value = float(scorer(text, entry))
        except BaseException as error:  # a scorer may well call exit()
            return {"error": self._evaluator.failure or f"{type(error).__name__}: {error}"[:500]}
        finally:
            self._is_scoring = False
        if self._evaluator.failure:  # which the scorer took for text that it cannot read
            return {"error": self._evaluator.failure}
        return {"score": value if math.isfinite(value) else str(value)}

    def _refuse(self, event: str, arguments: tuple) -> None:
        """An audit hook (Python's "Audit events table"): no text is evaluated in this process while it scores.

        It is no wall, and need not be one: it acts before the first text could run.
        """
        if not self._is_scoring or self._evaluator.is_reading:
            return
        if event == "compile":
            source = arguments[0]
            self._source = source.decode(errors="replace") if isinstance(source, bytes) else str(source)
        elif event == "exec" and _is_of_text(arguments[0].co_filename, sys._getframe(1)):
            if not self._evaluator.is_trusted(self._source):
                self._evaluator.failure = UNWALLED
                raise PermissionError(UNWALLED)


def _is_of_text(file: str, caller: types.FrameType) -> bool:
    """Tell whether code was made of text, and not of a module's file or by one of GENERATORS."""
    is_module = not file.startswith("<") or file.startswith("<frozen ")
    return not is_module and caller.f_globals.get("__name__") not in GENERATORS


def _rebound(dataset: Any, evaluator: Evaluator) -> Callable[[str, dict], float]:
    """A task's scorer in which eval, parse_expr and sympy's are the evaluator's; the library stays as it is."""
    score = type(dataset).score_answer
    if not isinstance(score, types.FunctionType):
        return dataset.score_answer
    module = types.SimpleNamespace(**vars(sympy) | {"parse_expr": evaluator.parse_expr})
    names: dict[str, Any] = {"eval": evaluator.eval}
    for name, value in score.__globals__.items():
        if value is sympy:
            names[name] = module
        elif value is sympy.parse_expr:
            names[name] = evaluator.parse_expr
    code, defaults, closure = score.__code__, score.__defaults__, score.__closure__
    copy = types.FunctionType(code, score.__globals__ | names, score.__name__, defaults, closure)
    copy.__kwdefaults__ = score.__kwdefaults__
    return types.MethodType(copy, dataset)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
