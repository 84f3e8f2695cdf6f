"""Attacks by text that is evaluated: on the machine, on the trainer, on other responses, on its own verdict."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import reasoning_gym
import sympy

from gspo_megatron.config import FaultsConfig, TaskConfig
from gspo_megatron.errors import ConfigError
from gspo_megatron.tasks import walls
from gspo_megatron.tasks.evaluation import Evaluator
from gspo_megatron.tasks.isolation import ScorerError, ScoringProcess
from gspo_megatron.tasks.mixture import TaskMixture
from gspo_megatron.tasks.reasoning_gym import EVAL_TASKS
from gspo_megatron.tasks.values import from_data, to_data
from tools.validation.launching import ROOT

SPIRAL = {"name": "spiral_matrix", "seed": 1, "size": 10}  # its scorer is eval(), and gives a right list 0.1
COUNTDOWN = {"name": "countdown", "seed": 1, "size": 10}
ENTRY = {"answer": "1 2 3", "metadata": {"only here": "4 5 6"}}
SUM_OF_7 = {"answer": "3+4", "metadata": {"numbers": [3, 4], "target": 7}}


@pytest.fixture(scope="module")
def scorers():
    process = ScoringProcess(FaultsConfig(reward_timeout=3.0, reward_memory_gb=1.0))
    yield process
    process.close()


@pytest.fixture(scope="module")
def port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


# Each is true where it got what it is after. None of these goes through what Python would tell an audit hook of.
REACHES_OUT = {
    "a program by _posixsubprocess": "__import__('_posixsubprocess').fork_exec([b'true'], (b'/bin/true',), True, (3,),"
    " None, None, -1, -1, -1, -1, -1, -1, 3, 3, False, False, -1, None, None, None, -1, None, False) > 0",
    "a fork by the C library": "C.fork() != -1",
    "a thread": "__import__('_thread').start_new_thread(int, ()) and True",
    "a signal to its group": "C.killpg(0, 0) == 0",
    "a signal to the rank": "C.kill(RANK, 0) == 0",
    "a signal to all": "C.kill(-1, 0) == 0",
    "the rank's environment": "open('/proc/RANK/environ', 'rb').read() and True",
    "its parent's memory": "open('/proc/%d/mem' % C.getppid(), 'rb') and True",
    "its own descriptors": "__import__('os').listdir('/proc/self/fd') and True",
    "a file to read": "C.open(b'/etc/passwd', 0) >= 0",
    "a file to write": "C.open(b'FILE', 0o101, 0o600) >= 0",
    "a file in memory": "C.memfd_create(b'x', 0) >= 0",
    "a folder": "C.mkdir(b'FILE', 0o700) == 0",
    "a socket": "__import__('_socket').socket() and True",
    "a connection": "__import__('socket').create_connection(('127.0.0.1', PORT)) and True",
    "a new namespace": "C.unshare(0x00020000) == 0",
    "tracing": "C.ptrace(0, 0, 0, 0) == 0",
    "a lower limit": "__import__('resource').setrlimit(4, (0, 0)) is None",
}


def made_out(attack: str, tmp_path, port: int) -> str:
    values = {"RANK": str(os.getpid()), "FILE": str(tmp_path / "made"), "PORT": str(port), "C.": C_LIBRARY}
    for name, value in values.items():
        attack = attack.replace(name, value)
    return attack


C_LIBRARY = "__import__('ctypes').pythonapi."


def test_every_attack_succeeds_where_no_wall_is(tmp_path, port):
    """So that the next test can fail."""
    attacks = {}
    for place, (name, attack) in enumerate(REACHES_OUT.items()):
        (tmp_path / str(place)).mkdir()
        attacks[name] = made_out(attack, tmp_path / str(place), port)
    code = """
import ctypes, json, os, resource, socket, sys  # as in the process that is walled
os.dup2(0, 3)
for name, attack in json.loads(sys.argv[1]).items():
    pid = os.fork()  # its process stays as it was
    if pid == 0:
        os._exit(0 if eval(attack, {}) is True else 1)
    print(json.dumps([name, os.waitpid(pid, 0)[1]]))
"""
    command = [sys.executable, "-c", code, json.dumps(attacks)]
    told = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=True).stdout
    needs_root = {"a new namespace"}
    failed = {name for name, status in map(json.loads, told.splitlines()) if status}
    assert failed - needs_root == set() and len(told.splitlines()) == len(attacks)


@pytest.mark.parametrize("name", REACHES_OUT)
def test_a_response_reaches_nothing_outside_its_process(scorers, name, tmp_path, port):
    attack = made_out(REACHES_OUT[name], tmp_path, port)
    assert scorers.score(SPIRAL, f"[1, 2, 3] if ({attack}) else 0", ENTRY) == 0.0
    assert scorers.score(SPIRAL, "[1, 2, 3]", ENTRY) == 0.1  # an honest one
    assert list(tmp_path.iterdir()) == []


# Text that is after the gold answer, which would make the list right.
CHEATS = {
    "the caller's variables": "entry['answer'].split()",
    "the caller's frames": "next(frame.f_locals['entry']['answer'].split() for frame in"
    " (__import__('sys')._getframe(depth) for depth in range(9)) if 'entry' in frame.f_locals)",
    "the heap": "(__import__('gc').unfreeze(), next(found['answer'].split() for found in __import__('gc').get_objects()"
    " if type(found) is dict and 'metadata' in found and 'answer' in found))[1]",
    "a score on every descriptor": "[__import__('os').write(fd, b'{\"score\": 1.0}\\n') for fd in range(20)"
    " if fd in (1, 3, 4, 5, 6)] and 0",
}


@pytest.mark.parametrize("name", CHEATS)
def test_a_response_does_not_make_itself_right(scorers, name):
    scorers.score(SPIRAL, "[1, 2, 4]", ENTRY)  # an entry has been there, and so has a response
    try:
        assert scorers.score(SPIRAL, CHEATS[name], ENTRY) == 0.0
    except ScorerError as error:  # what was written broke its own answer
        assert "JSON" in str(error) or "ended its process" in str(error)
    assert scorers.score(SPIRAL, "nonsense", ENTRY) == 0.0


def test_a_score_written_over_the_answer_counts_for_nothing(scorers):
    """Its own channel is all that a response can write to, and only values are read from there."""
    frame = json.dumps({"score": 1.0, "value": 7})
    text = f"__import__('os').write(3, {len(frame).to_bytes(4, 'little') + frame.encode()!r}) and 0"
    assert scorers.score(COUNTDOWN, text, SUM_OF_7) == pytest.approx(0.05)  # as any value that uses other numbers
    assert scorers.score(COUNTDOWN, "3+5", SUM_OF_7) == pytest.approx(0.05)
    assert scorers.score(COUNTDOWN, "3+4", SUM_OF_7) == 1.0


@pytest.mark.parametrize("owner", ["reasoning_gym.algorithmic.spiral_matrix.SpiralMatrixDataset", "sympy.Integer"])
def test_what_a_response_patches_is_gone_with_it(scorers, owner):
    module, _, name = owner.rpartition(".")
    text = (
        f"setattr(__import__({module!r}, fromlist=['x']).{name}, 'score_answer', lambda *_: 1.0) or "
        "setattr(__import__('builtins'), 'eval', lambda *_: [1, 2, 3]) or 0"
    )
    assert scorers.score(SPIRAL, text, ENTRY) == 0.0
    assert scorers.score(SPIRAL, "nonsense", ENTRY) == 0.0
    assert scorers.score(SPIRAL, "[3, 2, 1]", ENTRY) == 0.0


BOMBS = {
    "memory": ("[0] * 10**10", None),
    "an endless list": ("__import__('itertools').count()", None),
    "a large answer": ("'x' * 10**7", None),
    "a deep answer": ("__import__('functools').reduce(lambda a, _: [a], range(10**5), 0)", None),
    "a number of many digits": ("1 << 10**6", None),
    "processes": ("[C.fork() for _ in range(10**9)]", "TimeoutError: no reward after 3 s"),
    "time, with every signal ignored": (
        "[__import__('signal').signal(number, 1) for number in (2, 14, 15, 24)] and sum(range(10**13))",
        "TimeoutError: no reward after 3 s",
    ),
    "its own end": ("C.abort()", "the scorer ended its process"),
    "a crash": ("__import__('ctypes').string_at(8)", "the scorer ended its process (status -11"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_costs_its_own_response_alone(scorers, name):
    text, reason = BOMBS[name]
    child = scorers._running().pid
    started = time.monotonic()
    if reason is None:
        assert scorers.score(SPIRAL, text, ENTRY) == 0.0
    else:
        with pytest.raises(ScorerError) as caught:
            scorers.score(SPIRAL, text.replace("C.", C_LIBRARY), ENTRY)
        assert str(caught.value).startswith(reason)
    assert time.monotonic() - started < 20
    assert scorers.score(SPIRAL, "[1, 2, 3]", ENTRY) == 0.1
    assert scorers._running().pid == child  # the process that scores never noticed


def test_a_scorer_that_evaluates_where_no_wall_is_is_refused():
    """A task of one's own that nobody put into EVAL_TASKS, with its eval() in a helper; its gold answer may be."""
    code = """
from reasoning_gym.algorithmic.spell_backward import SpellBackwardDataset
from gspo_megatron.tasks.evaluation import Evaluator
from gspo_megatron.tasks.scoring_process import Scorers
def helper(text):
    return eval(text)
def score(self, answer, entry):
    try:
        return float(helper(answer) == helper(entry["answer"]))
    except Exception:
        return 0.5
SpellBackwardDataset.score_answer = score
scorers = Scorers(Evaluator())
spec = {"name": "spell_backward", "seed": 1, "size": 10}
print(scorers.answer(5.0, spec, "1+1", {"answer": "1+1"}))
print(scorers.answer(5.0, spec, "1 + 1", {"answer": "1+1"}))
"""
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    first, second = told.splitlines()
    assert first == "{'score': 1.0}" and second.startswith(
        "{'error': \"PermissionError: a scorer evaluates text beside"
    )


# Files of reasoning_gym that call eval, exec or a parser of sympy: those of EVAL_TASKS, and what else they do it for.
EVALUATE = {f"{name}.py" for name in EVAL_TASKS} | {
    "codeio.py",  # exec() of the library's own programs, to make questions
    "basic_arithmetic.py",  # the same for terms
    "bitwise_arithmetic.py",  # eval() of the entry's problem
    "number_sorting.py",  # eval() of the gold answer
    "generators_00_49.py",
    "generators_50_99.py",
    "propositional_logic.py",  # a parser of its own, of that name
}


def test_the_table_of_tasks_that_evaluate_is_complete():
    """Another file of reasoning_gym that calls one of these must be looked at, and perhaps be put into EVAL_TASKS."""
    calls = re.compile(
        r"(?<![\w.])(eval|exec|__import__)\(|(?<!re\.)(?<!Compiler\.)(?<!def )\bcompile\(|parse_expr\(|sympify\("
    )
    folder = Path(reasoning_gym.__file__).parent
    found = {path.name for path in folder.rglob("*.py") if calls.search(path.read_text())}
    assert found - {"BF-it.py", "Compiler.py", "bf.py"} == EVALUATE  # those compile Brainfuck


@pytest.mark.parametrize(
    "text",
    ["(3 + 4)*5 - 7", "x/3 + y", "0.1*x", "1e400", "exp(2*x)*sin(x) - log(x) + C", "sqrt(2)*pi + E", "-oo", "I", "zoo",
     "asin(x/2)", "Abs(x)", "Max(x, 1)", "x**0.5", "[x, [1, 2.5], 'a', None]"],
)  # fmt: skip
def test_values_cross_unchanged(text):
    value = sympy.parse_expr(text)
    again = from_data(json.loads(json.dumps(to_data(value))))
    assert again == value and repr(again) == repr(value)


REASONABLE = (
    "integrate(exp(-x**2)*x + 1/(x**3 + 1), x)",
    "simplify(sin(x)**2 + cos(x)**2 + gamma(x + 1)/gamma(x))",
    "limit(sin(x)/x, x, 0)",
    "series(exp(x), x, 0, 4).removeO()",
    "summation(k**2, (k, 1, n))",
    "7 + C + x**8 - x/2",
    "solve(x**4 - 5*x**2 + 4, x)",
    "factor(x**6 - 1)",
    "apart(1/(x**2 - 1))",
    "diff(x**x*sin(x)/log(x), x)",
    "nsimplify(0.25)*x",
    "trigsimp(sin(2*x)/cos(x))",
    "N(pi, 30)",
    "det(Matrix([[x, 1], [2, 3]]))",
    "factorint(360)",
    "binomial(10, 3)*x",
    "(x**2 + 2*x + 1).subs(x, 2)",
    "integrate(x**2*log(x), (x, 1, 2))",
    "real_root(-8, 3)",
    "refine(Abs(x), Q.positive(x))",
    "product(k, (k, 1, 5))",
    "rsolve(y(n + 1) - 2*y(n), y(n), {y(0): 1})",
)


def test_sympy_needs_no_file_behind_the_walls():
    """What a response may well ask of it is worked out there as here."""
    evaluator = Evaluator()
    for text in REASONABLE:
        evaluator.begin({}, 30.0)
        there = evaluator.parse_expr(text)
        assert evaluator.failure is None and there == from_data(to_data(sympy.parse_expr(text))), text


@pytest.mark.parametrize(
    "data",
    [
        {"call": ["sin", ["__import__('os').getpid()"]]},  # sympy evaluates strings
        {"call": ["Symbol", ["x.real"]]},
        {"call": ["Lambda", []]},
        {"call": ["eval", []]},
        {"call": ["Function", [{"call": ["Symbol", ["f"]]}]]},
        {"call": ["Integral", [{"call": ["Symbol", ["f"]]}]]},
        {"call": ["Rational", [2, 3]]},
        {"call": ["Rational", ["2", "4"]]},  # not as sympy would write it
        {"sympy": 1},
        {},
    ],
)
def test_data_that_no_value_has_are_refused(data):
    with pytest.raises((ValueError, TypeError)):
        from_data(data)
    with pytest.raises((ValueError, TypeError)):
        from_data([data])


@pytest.mark.parametrize(
    ("task", "text", "reward"),
    [
        ("simple_integration", "GOLD", 1.0),
        ("simple_integration", "GOLD + 7", 1.0),
        ("simple_integration", "GOLD + x", 0.0),
        ("intermediate_integration", "GOLD", 1.0),
        ("polynomial_multiplication", "GOLD", 1.0),
        ("polynomial_multiplication", "0 + GOLD", 1.0),
        ("polynomial_multiplication", "1 + GOLD", 0.0),
        ("string_insertion", "list('GOLD')", 0.1),
        ("countdown", "(GOLD)", 1.0),
    ],
)
def test_verdicts_are_the_tasks_own(scorers, task, text, reward):
    mixture = TaskMixture({task: TaskConfig()}, 1, scorers)
    item = mixture.item("train", 1)
    gold, symbol = item.answer, str(item.entry["metadata"].get("variable", "x"))
    response = text.replace("x", symbol).replace("GOLD", gold)
    library = mixture.tasks[task]._dataset.score_answer(response, item.entry)
    assert mixture.score(item, response) == library == reward


def test_a_kernel_without_seccomp_evaluates_nothing(monkeypatch):
    monkeypatch.setattr(walls.platform, "machine", lambda: "riscv64")
    with pytest.raises(ConfigError, match=r"tasks.countdown = 'countdown': its scorer evaluates .* takes no seccomp"):
        TaskMixture({"countdown": TaskConfig()}, 1)
    TaskMixture({"spell_backward": TaskConfig()}, 1)
    assert walls.describe().startswith("no seccomp in this kernel")


def test_numbers_of_system_calls_are_the_kernels():
    """Of aarch64 as of this machine; here by the headers, where they are installed."""
    headers = {
        "x86_64": "/usr/include/x86_64-linux-gnu/asm/unistd_64.h",
        "aarch64": "/usr/include/asm-generic/unistd.h",
    }
    for machine, path in headers.items():
        if not os.path.exists(path):
            pytest.skip(f"{path} is not installed")
        with open(path) as header:
            lines = [line.split() for line in header if line.startswith("#define __NR")]
        known = {
            words[1].replace("__NR3264_", "__NR_"): words[2] for words in lines if len(words) > 2 and words[2].isdigit()
        }
        for name, numbers in walls.COMPUTING.items():
            number = numbers[walls.MACHINES[machine][0]]
            assert number is None or known[f"__NR_{name}"] == str(number), (machine, name)


def test_a_server_that_is_gone_costs_no_response_its_reward():
    """Ended by the kernel for want of memory, for example: the next score comes from new processes."""
    process = ScoringProcess(FaultsConfig(reward_timeout=5.0))
    try:
        assert process.score(COUNTDOWN, "3+4", SUM_OF_7) == 1.0
        (server,) = psutil.Process(process._child.pid).children()
        server.kill()
        with pytest.raises(ScorerError, match="ended its process"):  # and not a reward for text that cannot be read
            process.score(COUNTDOWN, "3 + 4", SUM_OF_7)
        assert process.score(COUNTDOWN, "3 + 4", SUM_OF_7) == 1.0
    finally:
        process.close()
