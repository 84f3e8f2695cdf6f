"""Scorers in a process of their own: the same rewards, and nothing that a response does reaches the trainer."""

import os
import signal
import socket
import time

import psutil
import pytest

from gspo_megatron.batch import TaskItem
from gspo_megatron.config import FaultsConfig, TaskConfig
from gspo_megatron.errors import RolloutError
from gspo_megatron.tasks import isolation
from gspo_megatron.tasks.isolation import ScorerError, ScoringProcess
from gspo_megatron.tasks.mixture import TaskMixture
from gspo_megatron.tasks.reasoning_gym import EVAL_TASKS
from tests.processes import is_gone_with_its_rank

SPELL = {"name": "spell_backward", "seed": 1, "size": 10}
SPIRAL = {"name": "spiral_matrix", "seed": 1, "size": 10}  # its scorer is eval()
ENTRY = {"answer": "1 2 3", "metadata": {"solution": [1, 2, 3]}}


@pytest.fixture(scope="module")
def scorers():
    process = ScoringProcess(FaultsConfig(reward_timeout=1.0, reward_memory_gb=1.0))
    yield process
    process.close()


def test_rewards_are_those_of_the_task(scorers):
    tasks = {"spell_backward": TaskConfig(), "prime_factorization": TaskConfig()}
    here, there = TaskMixture(tasks, seed=1), TaskMixture(tasks, 1, scorers)
    items = [here.item("train", index) for index in range(12)]
    assert {item.task for item in items} == set(tasks)
    for item in items:
        for text in (item.answer, item.answer[:-1] + "x", "", "2 × two", "ü\n\x00"):
            assert there.score(item, text) == here.score(item, text)
        assert there.score(item, item.answer) == 1.0


def test_every_task_that_runs_responses_as_code_can_be_trained_on(scorers):
    """Their gold answers score 1 there; here nobody may ask."""
    for name in EVAL_TASKS:
        mixture = TaskMixture({name: TaskConfig()}, 1, scorers)
        item = mixture.item("train", 0)
        assert mixture.score(item, item.answer) == 1.0 and mixture.score(item, "1 +") < 0.1
        with pytest.raises(ValueError, match="needs a ScoringProcess"):
            TaskMixture({name: TaskConfig()}, 1).score(item, item.answer)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("exit()", "SystemExit"),
        ("[c for c in iter(int, 1)]", "TimeoutError: no reward after 1 s (faults.reward_timeout)"),  # never ends
        ("sum(range(10**12))", "TimeoutError: no reward after 1 s (faults.reward_timeout)"),  # never leaves C
        ("__import__('os')._exit(3)", "the scorer ended its process (status 3"),
    ],
)
def test_what_ends_a_scorer_ends_neither_the_rank_nor_the_next_scorer(scorers, text, reason):
    started = time.monotonic()
    with pytest.raises(ScorerError) as caught:
        scorers.score(SPIRAL, text, ENTRY)
    assert str(caught.value).startswith(reason) and time.monotonic() - started < 10
    assert scorers.score(SPELL, "nus", {"answer": "nus", "metadata": {"word": "sun"}}) == 1.0


# The scorer of spiral_matrix swallows what its eval() raises and gives a right list 0.1: so would each of these get,
# if it were allowed.
ATTEMPTS = {
    "memory": "[0] * 10**10 and [1, 2, 3]",  # 80 GB, the limit is 1
    "shell": "__import__('os').system('rm FILE') or [1, 2, 3]",
    "remove": "__import__('os').remove('FILE') or [1, 2, 3]",
    "write": "open('FILE', 'w') and [1, 2, 3]",
    "network": "__import__('socket').create_connection(('127.0.0.1', PORT)) and [1, 2, 3]",
}


@pytest.mark.parametrize("name", ATTEMPTS)
def test_what_a_response_may_not_do(scorers, name, tmp_path):
    assert scorers.score(SPIRAL, "[1, 2, 3]", ENTRY) == 0.1
    victim = tmp_path / "victim"
    victim.write_text("kept")
    with socket.create_server(("127.0.0.1", 0)) as server:
        text = ATTEMPTS[name].replace("FILE", str(victim)).replace("PORT", str(server.getsockname()[1]))
        assert scorers.score(SPIRAL, text, ENTRY) == 0.0
    assert victim.read_text() == "kept"


def test_the_environment_is_not_passed_on(monkeypatch):
    """A response that reads the environment finds no token in it."""
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    process = ScoringProcess(FaultsConfig())
    process.start()
    assert "WANDB_API_KEY" not in psutil.Process(process._child.pid).environ()
    process.close()


def test_a_hanging_scorer_costs_a_response_its_reward_and_no_more(scorers, caplog):
    mixture = TaskMixture({"countdown": TaskConfig()}, 1, scorers)
    item = mixture.item("train", 0)
    assert mixture.score(item, "9**9**9**9") == 0.0
    assert "TimeoutError: no reward after 1 s" in caplog.text
    assert mixture.score(item, item.answer) == 1.0


def test_a_scorer_that_hangs_at_the_gold_answer_too_stops_the_run(scorers):
    mixture = TaskMixture({"countdown": TaskConfig()}, 1, scorers)
    item = mixture.item("train", 0)
    broken = TaskItem(item.task, item.question, "9**9**9**9", item.entry)
    with pytest.raises(RolloutError, match=r"tasks.countdown: the scorer raised TimeoutError: .* gold answer too"):
        mixture.score(broken, "8**8**8**8")


def test_a_program_that_cannot_start_says_so(monkeypatch):
    monkeypatch.setattr(isolation, "PROGRAM", "gspo_megatron.no_such_module")
    with pytest.raises(ScorerError, match=r"ended with status 1 \(python -m gspo_megatron.no_such_module\)"):
        ScoringProcess(FaultsConfig()).score(SPELL, "x", {})


def test_the_process_does_not_outlive_its_rank(tmp_path):
    """Killed outright while a scorer hangs: the kernel's timer ends the process all the same."""
    code = f"""
from gspo_megatron.config import FaultsConfig
from gspo_megatron.tasks.isolation import ScoringProcess
process = ScoringProcess(FaultsConfig(reward_timeout=2.0))
process.score({SPELL!r}, "nus", {{"answer": "nus", "metadata": {{"word": "sun"}}}})
print(process._child.pid, flush=True)
process.score({SPIRAL!r}, "sum(range(10**13))", {ENTRY!r})
"""
    assert is_gone_with_its_rank(code)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_schedulers_signal_costs_no_reward(number):
    """Slurm signals every process of a step; the step that is finished after it must get its rewards."""
    process = ScoringProcess(FaultsConfig(reward_timeout=5.0))
    try:
        process.start()
        os.kill(process._child.pid, number)  # before it has come up
        assert process.score(SPELL, "cba", {"answer": "cba"}) == 1.0
        os.kill(process._child.pid, number)
        assert process.score(SPELL, "cba", {"answer": "cba"}) == 1.0
    finally:
        process.close()
