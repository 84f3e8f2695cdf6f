"""Users' own reward functions on real processes: what they score, and what becomes of those that misbehave."""

import os
import signal
import socket
import textwrap
import time

import psutil
import pytest

from gspo_megatron.batch import Response, Score, TaskItem
from gspo_megatron.config import FaultsConfig, RewardConfig, TaskConfig
from gspo_megatron.errors import ConfigError, RolloutError
from gspo_megatron.tasks import reward_calls, reward_worker
from gspo_megatron.tasks.rewards import RewardRunner
from tests.processes import imported_by, is_gone_with_its_rank
from tools.validation.launching import gone

MINE = '''
import asyncio, mmap, multiprocessing, os, socket, subprocess, sys, time

def length(completions, **kwargs):
    print("length prints", len(completions))
    return [float(len(text)) for text in completions]

def right(completions, solution):
    return [float(text == gold) for text, gold in zip(completions, solution)]

def only_long(completions):
    return [1.0 if len(text) > 2 else None for text in completions]

def nothing(completions):
    return [None] * len(completions)

def needs(completions, difficulty):
    return [0.0] * len(completions)

def roles(prompts, completions):
    return [float(prompt[-1]["role"] == "user" and text[0]["content"] == "yes")
            for prompt, text in zip(prompts, completions)]

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": 0.5, "exact": solution_str == ground_truth, "note": "x"}

def huge(solution_str):
    return {"score": 1.0, "text": "x" * 10**7} | {f"key{i}": i for i in range(10**5)}

def pooled(completions):
    with multiprocessing.Pool(2) as pool:
        return pool.map(len, completions)

async def threaded(completions):
    await asyncio.to_thread(time.sleep, 0.05)
    return [1.0]

async def slow(completions):
    await asyncio.sleep(0.05)
    return [1.0]

RECORD = os.environ.get("RECORD")

def misbehaves(solution_str):
    """What a response says."""
    if RECORD:
        with open(RECORD, "a") as file:
            file.write(solution_str + "\\n")
    if solution_str == "hang":
        time.sleep(1000)
    if solution_str == "raise":
        raise ValueError("no good")
    if solution_str == "exit":
        sys.exit(3)
    if solution_str == "interrupt":
        raise KeyboardInterrupt
    if solution_str == "end":
        os._exit(3)
    if solution_str == "orphan":
        if os.fork():
            os._exit(4)
        time.sleep(1000)
    if solution_str == "crash":
        os.kill(os.getpid(), 11)
    if solution_str == "fork":
        os.fork()
    if solution_str == "child":
        os.environ["CHILD"] = str(subprocess.Popen(["sleep", "1000"]).pid)
        time.sleep(1000)
    if solution_str == "cwd":
        os.chdir("/")
    if solution_str == "close":
        os.closerange(3, 100)
    if solution_str == "scribble":
        for fd in range(3, 10):
            try:
                os.write(fd, b'5\\n')
            except OSError:
                pass
    if solution_str == "noise":
        os.write(1, b'{"index": 0, "score": 100.0}\\n'); print("noise"); sys.stdin.read()
    if solution_str == "slow":
        time.sleep(0.3)
        raise ValueError("slow")
    values = {"nan": float("nan"), "inf": float("inf"), "text": "1", "none": None, "nested": [[1.0]]}
    return values.get(solution_str, 1.0)

def all_misbehave(completions):
    scores = [misbehaves(text) for text in completions]
    return scores[1:] if "few" in completions else scores

async def misbehaves_later(completions):
    await asyncio.sleep(0.01)
    if completions[0] == "never":
        await asyncio.Event().wait()
    while completions[0] == "stubborn":
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            pass
    if completions[0] == "cancel":
        raise asyncio.CancelledError
    return [misbehaves(completions[0])]

def writes(solution_str):
    open(solution_str, "w")
    return 1.0

def connects(solution_str):
    socket.create_connection(("127.0.0.1", int(solution_str)), 5).close()
    return 1.0

def environment(solution_str):
    return float(os.environ.get("WANDB_API_KEY") == solution_str)

def allocates(solution_str):
    return float(len(mmap.mmap(-1, int(solution_str))))
'''


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    path = tmp_path_factory.mktemp("user") / "mine.py"
    path.write_text(MINE)
    return str(path)


@pytest.fixture
def run(mine, monkeypatch):
    """Makes a runner of functions of MINE, which is closed at the end."""
    monkeypatch.setattr(reward_calls, "GRACE", 0.2)
    runners = []

    def make(*rewards, seconds=1.0, **fields):
        configs = [one if isinstance(one, RewardConfig) else RewardConfig(f"{mine}:{one}") for one in rewards]
        config = TaskConfig(data="rows.jsonl", reward=tuple(configs), **fields)
        runners.append(RewardRunner("mine", config, FaultsConfig(reward_timeout=seconds, reward_memory_gb=1.0)))
        return runners[-1]

    yield make
    for runner in runners:
        runner.close()


def responses(*texts, **columns):
    item = TaskItem("mine", "q", "gold", {"prompt": "q"} | columns)
    return [Response(item, text, [1]) for text in texts]


def rewards(runner, *texts, **columns):
    return [score.reward for score in runner.score(responses(*texts, **columns), lambda done: None)]


def errors(runner, *texts):
    return [score.error for score in runner.score(responses(*texts), lambda done: None)]


# ---- Scores ----


def test_the_reward_is_the_weighted_sum_over_the_functions_that_apply(run, mine):
    """TRL's nansum of weight times score."""
    weights = {"length": 0.5, "only_long": 2.0, "right": -1.0}
    runner = run(*(RewardConfig(f"{mine}:{name}", weight) for name, weight in weights.items()))
    found = runner.score(responses("abc", "ab", solution="ab"), lambda done: None)
    assert found[0] == Score(1.5 + 2.0 - 0.0, {"length": 3.0, "only_long": 1.0, "right": 0.0})
    assert found[1] == Score(1.0 - 1.0, {"length": 2.0, "right": 1.0})
    assert runner.score([], lambda done: None) == []


def test_verls_dict_has_further_parts(run):
    found = run("compute_score").score(responses("gold", "x"), lambda done: None)
    assert found == [
        Score(0.5, {"compute_score": 0.5, "compute_score/exact": 1.0}),
        Score(0.5, {"compute_score": 0.5, "compute_score/exact": 0.0}),
    ]


def test_a_huge_dict_is_cut(run):
    (score,) = run("huge").score(responses("x"), lambda done: None)
    assert score.reward == 1.0 and len(score.parts) == 65


def test_conversations(run):
    prompt = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    assert rewards(run("roles"), "yes", "no", prompt=prompt) == [1.0, 0.0]


def test_the_extractor_is_for_math_verify_alone(run):
    runner = run(RewardConfig("math_verify", 10.0), "length", answer_extractor="boxed")
    item = TaskItem("mine", "q", "\\frac{1}{2}", {"prompt": "q"})
    texts = ["1/2 or \\boxed{0.5}", "\\boxed{1}", "0.5"]  # the last one has no box
    found = runner.score([Response(item, text, []) for text in texts], lambda done: None)
    assert [score.parts["math_verify"] for score in found] == [1.0, 0.0, 0.0]
    assert [score.parts["length"] for score in found] == [float(len(text)) for text in texts]


def test_told_grows_to_the_number_of_responses(run):
    seen = []
    run("length", "slow", concurrency=8).score(responses(*["x"] * 48), seen.append)
    assert seen == sorted(seen) and seen[-1] == 48 and 3 < len(seen) < 30  # 0.3 s


def test_async_responses_are_scored_at_the_same_time(run):
    runner = run("slow", seconds=10.0)
    assert runner.check() == ["slow: TRL's form, async, 64 at a time"]
    started = time.monotonic()
    assert rewards(runner, *["x"] * 640) == [1.0] * 640
    assert 0.5 <= time.monotonic() - started < 1.5


def test_functions_may_have_processes_and_threads(run):
    assert rewards(run("pooled"), "abc", "", "ab") == [3.0, 0.0, 2.0]
    started = time.monotonic()
    assert rewards(run("threaded"), *["x"] * 320) == [1.0] * 320  # 5 at a time, as asyncio has it, would take 3.2 s
    assert time.monotonic() - started < 2.0


def test_what_a_function_prints_is_on_stderr(run, capfd):
    assert rewards(run("length"), "abc") == [3.0]
    captured = capfd.readouterr()
    assert captured.err == "length prints 1\n" and captured.out == ""


# ---- Faults ----

FAULTS = {
    "raise": r"raised ValueError: no good (mine.py, line ",
    "exit": "raised SystemExit: 3 (mine.py",
    "interrupt": "raised KeyboardInterrupt (mine.py",
    "nan": "returned nan, which is not a finite number",
    "inf": "returned inf",
    "text": "returned a value of type str where a number belongs",
    "nested": "returned a value of type list where a number belongs",
    "none": "returned None, so nothing rewards it",
}
LOST = {
    "hang": "gave no answer within 1 s (faults.reward_timeout)",
    "end": "ended its process (status 3)",
    "orphan": "ended its process (status 4)",  # and left one behind that holds its pipes
    "crash": "ended its process (SIGSEGV)",
}
FORMS = ("misbehaves", "all_misbehave", "misbehaves_later")


@pytest.mark.parametrize("function", FORMS)
def test_a_fault_costs_its_own_response_alone(run, function):
    runner = run(function, on_error=-1.0)
    expected = FAULTS | LOST
    texts = [text for fault in expected for text in (fault, "fine")]
    found = runner.score(responses(*texts, "fork", "cwd", "noise", "fine"), lambda done: None)
    for text, score in zip(texts, found, strict=False):
        if text == "fine":
            assert score == Score(1.0, {function: 1.0})
        else:
            assert score.reward == -1.0 and score.error.startswith(f"reward {function} {expected[text]}")
    assert [score.reward for score in found[-4:]] == [1.0] * 4


def test_a_response_can_be_dropped(run):
    first, second = run("misbehaves", "length", on_error="drop").score(responses("raise", "x"), lambda done: None)
    assert first.reward is None and first.error and second == Score(2.0, {"misbehaves": 1.0, "length": 1.0})


@pytest.mark.parametrize("text", ["never", "stubborn", "cancel"])
def test_an_async_function_that_does_not_return_costs_one_response(run, text):
    runner = run("misbehaves_later", seconds=0.5, concurrency=2)
    runner.check()
    started, process = time.monotonic(), runner._code.process.number
    assert rewards(runner, *["x"] * 5, text, *["x"] * 5) == [1.0] * 5 + [0.0] + [1.0] * 5
    assert time.monotonic() - started < 2.0 and runner._code.process.number == process  # the same one


def test_too_few_scores_are_a_fault_of_all(run):
    with pytest.raises(RolloutError, match=r"returned 2 scores in a call for 3 responses on each of 3 responses"):
        rewards(run("all_misbehave"), "few", "x", "x")


def test_a_fault_at_every_response_ends_the_run_with_one_message(run, mine):
    line = MINE.splitlines().index('        raise ValueError("no good")') + 1
    message = f"tasks.mine: reward '{mine}:misbehaves' raised ValueError: no good (mine.py, line {line}) on each of 4"
    runner = run("misbehaves")
    with pytest.raises(RolloutError) as caught:
        rewards(runner, *["raise"] * 4)
    assert str(caught.value) == f"{message} responses. Correct it."
    with pytest.raises(RolloutError, match="returned nan, .* on 2 of 3 responses, and the others failed as well. Corr"):
        rewards(runner, "nan", "nan", "raise")
    assert errors(runner, "raise")[0].startswith("reward misbehaves raised ValueError")  # one alone says nothing
    with pytest.raises(RolloutError, match="nothing' returned None, so nothing rewards it on each of 2 responses"):
        rewards(run("nothing"), "x", "y")


def test_after_three_in_a_row_the_rest_is_not_tried(run, tmp_path, monkeypatch):
    monkeypatch.setenv("RECORD", str(tmp_path / "tried"))
    runner = run("misbehaves", seconds=0.5)
    found = errors(runner, "x", *["hang"] * 8)
    assert found[0] is None and all("gave no answer within 0.5 s" in error for error in found[1:])
    assert found[-1].endswith("for 3 other responses, so that this one was not tried")
    assert (tmp_path / "tried").read_text().split() == ["x"] + ["hang"] * 3
    assert rewards(runner, "x") == [1.0]  # the next call begins anew


def test_after_three_rounds_of_an_async_function_the_rest_is_not_tried(run):
    runner = run("misbehaves_later", seconds=0.2, concurrency=2)
    runner.check()
    started = time.monotonic()
    found = errors(runner, "x", *["never"] * 80)
    assert found[0] is None and all("gave no answer within 0.2 s" in error for error in found[1:])
    assert time.monotonic() - started < 4.0 and "for 6 other responses" in found[-1]  # all of them: 8 s
    assert rewards(runner, "x") == [1.0]


def test_a_blocked_event_loop_costs_the_response_that_blocks_it(run):
    runner = run("misbehaves_later", concurrency=4)
    texts = ["x"] * 6 + ["hang"] + ["x"] * 6
    assert rewards(runner, *texts) == [float(text == "x") for text in texts]


def test_a_call_for_all_that_raises_is_made_for_each_no_longer_than_it_may_take(run, tmp_path, monkeypatch):
    monkeypatch.setenv("RECORD", str(tmp_path / "tried"))
    monkeypatch.setattr(reward_calls, "IN_ALL", 2)
    runner = run("all_misbehave", seconds=0.5)
    found = errors(runner, "raise", "x", *["slow"] * 8)  # 2.4 s, 1.5 are allowed
    assert found[0].endswith(")") and found[1] is None and "raised ValueError: slow" in found[2]
    assert "raised ValueError: no good" in found[-1] and "in a call for 10 responses" in found[-1]
    tried = (tmp_path / "tried").read_text().split()
    assert tried[:4] == ["raise", "raise", "x", "slow"] and len(tried) < 10


def test_a_process_that_ended_between_two_calls_is_started_anew(run):
    runner = run("misbehaves")
    assert rewards(runner, "x") == [1.0]
    os.kill(runner._code.process._child.pid, signal.SIGKILL)
    time.sleep(0.2)
    assert rewards(runner, "x") == [1.0]


def test_files_that_a_function_closes_or_fills_are_told(run):
    assert "ended its process" in errors(run("misbehaves"), "x", "close")[1]
    assert "wrote into its process's answers" in errors(run("misbehaves"), "x", "scribble")[1]


# ---- The start ----

BAD = {
    "no_file": ("/nowhere/x.py:f", "there is no file /nowhere/x.py"),
    "no_module": ("no_such_package.x:f", "ModuleNotFoundError: No module named 'no_such_package'"),
    "no_name": ("MINE:lenght", "Did you mean length?"),
    "no_form": ("MINE:print", "has no print"),
    "value": ("MINE:RECORD", "is a value of type NoneType, not a function"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_work_is_told_at_the_start(run, mine, name):
    target = BAD[name][0].replace("MINE", mine)
    with pytest.raises(ConfigError) as caught:
        run(RewardConfig(target)).check()
    assert str(caught.value).startswith(f"tasks.mine.reward = {target!r}: ") and BAD[name][1] in str(caught.value)


def test_forms_are_told_at_the_start(run):
    runner = run("length", "misbehaves", RewardConfig("math_verify"))
    assert runner.check() == [
        "length: TRL's form, all responses in one call",
        "misbehaves: verl's form, one response at a time",
        "math_verify: built-in, one response at a time",
    ]


def test_an_import_that_ends_or_hangs_is_told(run, tmp_path, monkeypatch):
    (tmp_path / "ends.py").write_text("import os\nos._exit(5)\n")
    with pytest.raises(ConfigError, match=r"ends.py:f': its import ended its process \(status 5\)"):
        run(RewardConfig(f"{tmp_path}/ends.py:f")).check()
    monkeypatch.setattr("gspo_megatron.tasks.user_code.TAKING", 1.0)
    (tmp_path / "hangs.py").write_text("import time\ntime.sleep(1000)\n")
    with pytest.raises(ConfigError, match=r"hangs.py:f': its import took longer than 1 s"):
        run(RewardConfig(f"{tmp_path}/hangs.py:f")).check()


def test_a_column_that_the_data_have_not_is_told(run):
    message = "it wants difficulty, and the columns of the data are prompt, level"
    with pytest.raises(ConfigError, match=message):
        run("needs").check(["prompt", "level"])
    with pytest.raises(ConfigError, match=message):
        rewards(run("needs"), "x", level=1)
    assert rewards(run("needs"), "x", difficulty=1) == [0.0]


# ---- Walls and the process ----


def test_behind_walls_a_function_has_no_network_files_or_environment(run, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    names = ("writes", "connects", "environment", "allocates")
    with socket.create_server(("127.0.0.1", 0)) as server:
        values = (str(tmp_path / "file"), str(server.getsockname()[1]), "secret", str(2 << 30))
        tries = dict(zip(names, values, strict=True))
        trusted = {name: rewards(run(name), tries[name])[0] for name in names}
        assert trusted == {"writes": 1.0, "connects": 1.0, "environment": 1.0, "allocates": float(2 << 30)}
        (tmp_path / "file").unlink()
        walled = {name: run(name, isolate="process").score(responses(tries[name]), print)[0] for name in names}
    for name, error in {"writes": "PermissionError", "connects": "PermissionError", "allocates": "OSError"}.items():
        assert walled[name].reward == 0.0 and f"raised {error}" in walled[name].error
    assert walled["environment"] == Score(0.0, {"environment": 0.0}) and not (tmp_path / "file").exists()


def test_no_program_that_a_function_started_is_left(run):
    runner = run("misbehaves")
    runner.check()
    child = psutil.Process(runner._code.process._child.pid)
    assert "gave no answer" in errors(runner, "child")[0]
    assert gone([child.pid], 5)
    left = [process for process in psutil.process_iter(["cmdline"]) if process.info["cmdline"] == ["sleep", "1000"]]
    assert left == []


def test_the_process_does_not_outlive_its_rank(mine):
    code = f"""
    import time
    from gspo_megatron.tasks.reward_functions import Row
    from gspo_megatron.tasks.reward_worker import RewardProcess
    process = RewardProcess(0)
    process.start()
    for request in (("load", ["{mine}:misbehaves"], 30.0, 1), ("take", [Row("q", "hang", [], "t", "", {{}}, None)])):
        process.send(request, 30.0)
        process.answers(time.monotonic() + 30.0, 30.0)
    process.send(("ask", 0, [0], False), 30.0)
    print(process._child.pid, flush=True)
    time.sleep(1000)
    """
    assert is_gone_with_its_rank(textwrap.dedent(code))


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_schedulers_signal_costs_no_reward(run, number):
    runner = run("misbehaves", seconds=5.0)
    runner.start()
    os.kill(runner._code.process._child.pid, number)  # before it has come up
    assert rewards(runner, "x") == [1.0]
    os.kill(runner._code.process._child.pid, number)
    assert rewards(runner, "x") == [1.0] and runner._code.process.number == 1


def test_the_process_imports_neither_torch_nor_megatron():
    assert imported_by(f"import {reward_worker.PROGRAM}", "torch", "megatron", "numpy") == set()
