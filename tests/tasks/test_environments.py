"""Environments on real processes: what they answer, by value, and what becomes of those that misbehave."""

import json
import socket
import textwrap
import time

import pytest

from gspo_megatron.batch import Outcome, Response, Score, TaskItem
from gspo_megatron.config import FaultsConfig, RewardConfig, TaskConfig
from gspo_megatron.errors import ConfigError, RolloutError
from gspo_megatron.tasks.environments import EnvironmentRunner, EpisodeScorer, Observed
from gspo_megatron.tasks.rewards import RewardRunner
from gspo_megatron.tasks.tool_calls import calls_in
from tools.validation.launching import gone

MINE = '''
import asyncio, os, socket, time

class Game:
    def reset(self, word, **columns):
        self.word, self.turns, self.columns = word, 0, columns
        return f" It has {len(word)} letters."

    def step(self, text):
        self.turns += 1
        return ("", True, 1.0) if text == self.word else (f"not {text}", False, -0.5)

class Rewarding(Game):
    async def step(self, text):
        await asyncio.sleep(0)
        return ("well", text == self.word)

    def get_reward(self):
        return 10 - self.turns

class Bad:
    def reset(self, word):
        self.word = word
        if word == "no reset":
            raise ValueError("not today")
        if word == "number":
            return 5

    def step(self, text):
        if text == "raise":
            return 1 / 0
        if text == "hang":
            time.sleep(1000)
        if text == "exit":
            raise SystemExit(3)
        if text == "end":
            os._exit(7)
        if text == "print":
            print("a step prints")
        if text == "half":
            return "a\\ud800b", False
        if text == "long":
            return "x" * 2**21, False
        return {"one": ("x",), "words": ("x", "yes"), "number": (5, False), "nan": ("x", False, float("nan")),
                "list": ("x", False, [1.0])}.get(text, ("fine", False))

    def get_reward(self):
        return None if self.word == "none" else float("inf") if self.word == "inf" else 1.0

class Tools:
    """Its public methods are tools."""

    def reset(self, word=""):
        self.used = 0

    def add(self, a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: the first
            b: the second
        """
        self.used += 1
        return a + b

    async def shout(self, text: str) -> str:
        """Write in capitals.

        Args:
            text: what to write
        """
        return text.upper()

    def _secret(self):
        return "hidden"

    def get_reward(self):
        return self.used

class Reaching:
    """Tools that want out."""

    def reset(self, word=""): ...

    def add(self, a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: the first
            b: the second
        """
        return a + b

    def write(self, path: str) -> str:
        """Write a file.

        Args:
            path: of the file
        """
        with open(path, "w") as file:
            return f"{file.write('x')} written"

    def connect(self, port: int) -> str:
        """Open a connection.

        Args:
            port: of this machine
        """
        socket.create_connection(("127.0.0.1", port)).close()
        return "connected"

    def secret(self) -> str:
        """Read the environment."""
        return os.environ.get("WANDB_API_KEY", "none")

    def get_reward(self):
        return 1.0

class Undescribed:
    def reset(self): ...
    def tool(self, a): ...

class Wanting:
    def __init__(self, size): ...
    def reset(self): ...
    def step(self, text): ...

class NoReset:
    def step(self, text): ...

class Nothing:
    def reset(self): ...

class Unrewarded:
    def reset(self): ...
    def tool(self) -> int:
        """Give 1."""

not_a_class = 5

def length(completions, **kwargs):
    return [float(len(text[-1]["content"])) for text in completions]
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("environments")
    (made / "mine.py").write_text(textwrap.dedent(MINE))
    return made


@pytest.fixture
def runner(folder):
    """Makes runners, and ends them."""
    made = []

    def make(name: str, seconds: float = 20.0, **fields) -> EnvironmentRunner:
        config = TaskConfig(data=folder / "x.jsonl", environment=f"{folder}/mine.py:{name}", **fields)
        made.append(EnvironmentRunner("words", config, FaultsConfig(reward_timeout=seconds)))
        return made[-1]

    yield make
    for one in made:
        one.close()


def nothing() -> None: ...


def test_a_game_answers_turn_by_turn(runner):
    """Two episodes at once; the second ends at its second turn. Columns that reset takes come by name."""
    game = runner("Game")
    assert game.check(["word"]) == [f"{game.config.environment}: step(text), at most 8 turns, rewarded by the turns' "
                                    "rewards"]  # fmt: skip
    opened = game.open({3: {"word": "sun", "level": 1}, 5: {"word": "moon"}}, nothing)
    assert opened == {3: Observed(" It has 3 letters."), 5: Observed(" It has 4 letters.")}
    answers = game.turn({3: "sum", 5: "noon"}, nothing)
    assert answers[3] == Observed(messages=({"role": "user", "content": "not sum"},), reward=-0.5)
    assert answers[5].messages[0]["content"] == "not noon"
    assert game.turn({5: "moon"}, nothing) == {5: Observed(done=True, reward=1.0)}
    assert game.rewards([3, 5], nothing) == {3: Observed(), 5: Observed()}  # the class has no get_reward()


def test_async_methods_and_get_reward(runner):
    """10 less the turns of the episode, which step() of this class does not count."""
    game = runner("Rewarding")
    game.check(["word"])
    game.open({0: {"word": "sun"}}, nothing)
    assert game.turn({0: "sun"}, nothing) == {0: Observed(done=True)}
    assert game.rewards([0], nothing) == {0: Observed(reward=10.0)}


def test_tools_are_called_and_their_errors_are_told_to_the_model(runner):
    """One call, two calls, no call (the answer), a wrong name, arguments that do not fit, no JSON, a name that is none,
    and arguments of other types, of which Python would make "xxxx", 3 and 2.5."""
    tools = runner("Tools")
    assert "tools add, shout" in tools.check(["word"])[0]
    assert [schema["function"]["name"] for schema in tools.loaded().schemas] == ["add", "shout"]
    assert tools.loaded().schemas[0]["function"]["parameters"]["required"] == ["a", "b"]
    tools.open({i: {} for i in range(10)}, nothing)
    add = '<tool_call>{"name": "add", "arguments": {"a": 2, "b": 5}}</tool_call>'
    found = tools.turn(
        {
            0: f"I add. {add}",
            1: add + '<tool_call>\n{"name": "shout", "arguments": {"text": "ok"}}\n</tool_call>',
            2: "It is 7.",
            3: '<tool_call>{"name": "_secret"}</tool_call>',
            4: '<tool_call>{"name": "add", "arguments": {"a": 2}}</tool_call>',
            5: '<tool_call>{"name": "add", </tool_call>',
            6: '<tool_call>{"name": "reset"}',
            7: '<tool_call>{"name": "add", "arguments": {"a": "xx", "b": "xx"}}',
            8: '<tool_call>{"name": "add", "arguments": {"a": 2, "b": true}}',
            9: '<tool_call>{"name": "add", "arguments": {"a": 2, "b": 0.5}}',
        },
        nothing,
    )
    said = {i: [message["content"] for message in one.messages] for i, one in found.items()}
    assert said[0] == ["7"] and said[1] == ["7", "OK"] and said[2] == [] and found[2].done
    assert all(message["role"] == "tool" for one in found.values() for message in one.messages)
    assert said[3] == ["error: there is no tool '_secret'; there are add, shout"]
    assert said[4][0].startswith("error: TypeError: ") and "'b'" in said[4][0]
    assert said[5][0].startswith("error: the call is no JSON") and said[6][0].startswith("error: there is no tool")
    assert [said[i] for i in (7, 8, 9)] == [
        ["error: add: a = 'xx' must be of type int"],
        ["error: add: b = True must be of type int"],
        ["error: add: b = 0.5 must be of type int"],
    ]
    assert not any(one.done for i, one in found.items() if i != 2)
    assert [one.reward for one in tools.rewards([0, 1, 4], nothing).values()] == [1.0, 1.0, 0.0]


def test_tools_play_behind_walls_and_reach_nothing_from_there(runner, tmp_path, monkeypatch):
    """The same four calls, of a class that is trusted and of one that is not: each answers the model in its turn."""
    monkeypatch.setenv("WANDB_API_KEY", "key")
    made = tmp_path / "made"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        calls = [("add", {"a": 2, "b": 5}), ("write", {"path": str(made)}), ("connect", {"port": port}), ("secret", {})]

        def said(isolate: str) -> list[str]:
            tools = runner("Reaching", isolate=isolate)
            assert "tools add, connect, secret, write" in tools.check(["word"])[0]
            tools.open({i: {} for i in range(4)}, nothing)
            text = [json.dumps({"name": name, "arguments": arguments}) for name, arguments in calls]
            turns = {i: f"<tool_call>{call}</tool_call>" for i, call in enumerate(text)}
            answers = tools.turn(turns, nothing)
            assert [one.reward for one in tools.rewards(range(4), nothing).values()] == [1.0] * 4
            return [answers[i].messages[0]["content"] for i in range(4)]

        assert said("none") == ["7", "1 written", "connected", "key"]
        made.unlink()
        walled = said("process")
    assert walled[0] == "7" and walled[3] == "none" and not made.exists()
    assert all(text.startswith("error: PermissionError: ") for text in walled[1:3])


def test_tools_for_which_torch_does_not_fit_behind_the_walls_are_told_so(runner):
    """torch and what else is there takes about 700 MB of address space."""
    tools = runner("Tools", isolate="process")
    tools._code.process.memory = 400 << 20
    with pytest.raises(ConfigError, match="its tools cannot be described: .* fit into faults.reward_memory_gb"):
        tools.check(["word"])


def test_calls_are_found_in_a_text():
    text = 'a <tool_call> {"name": "x"} </tool_call> b <tool_call>{"name": "y", "arguments": [1]}'
    assert [call.name for call in calls_in(text)] == ["x", "y"] and calls_in("<tool>") == []


def test_what_misbehaves_fails_its_episode_alone(runner):
    bad = runner("Bad")
    bad.check(["word"])
    words = ["fine", "no reset", "number", "none", "inf"]
    opened = bad.open({i: {"word": word} for i, word in enumerate(words)}, nothing)
    assert opened[0] == opened[3] == Observed()
    assert opened[1].error == "raised ValueError: not today (mine.py, line 25)"
    assert opened[2].error == "returned a value of type int from reset(), where a text belongs"
    texts = ["raise", "exit", "one", "words", "number", "nan", "list", "print", "ok", "half", "long"]
    bad.open({i: {"word": "x"} for i in range(len(texts))}, nothing)
    answers = bad.turn(dict(enumerate(texts)), nothing)
    errors = [answers[i].error for i in range(len(texts))]
    assert errors[0].startswith("raised ZeroDivisionError: division by zero (mine.py, line ")
    assert errors[1].startswith("raised SystemExit: 3")
    assert errors[2] == "returned a value of type tuple from step(), where (observation, done) belongs"
    assert errors[3] == "returned a value of type str for done from step(), where True or False belongs"
    assert errors[4] == "returned a value of type int from step(), where a text belongs"
    assert errors[5] == "returned nan, which is not a finite number"
    assert errors[6] == "returned a value of type list where a number belongs"
    assert errors[7:10] == [None] * 3 and answers[8].messages[0]["content"] == "fine"
    assert answers[9].messages[0]["content"] == "a?b"  # no tokenizer can encode half of a surrogate pair
    assert errors[10].startswith("returned a text of 2097152 characters from step(), where a text of at most 1048576")
    bad.open({i: {"word": word} for i, word in enumerate(words) if i not in (1, 2)}, nothing)
    rewards = bad.rewards([0, 3, 4], nothing)
    assert rewards[0].reward == 1.0 and "returned None from get_reward()" in rewards[3].error
    assert rewards[4].error == "returned inf, which is not a finite number"


def test_one_that_hangs_costs_its_episode_and_no_other(runner):
    bad = runner("Bad", seconds=1.0)
    bad.check(["word"])
    bad.open({i: {"word": "x"} for i in range(6)}, nothing)
    begun = time.monotonic()
    answers = bad.turn({i: "hang" if i == 2 else "ok" for i in range(6)}, nothing)
    assert time.monotonic() - begun < 5
    assert answers[2].error == "gave no answer within 1 s (faults.reward_timeout)"
    assert [one.error for i, one in answers.items() if i != 2] == [None] * 5
    number = bad._code.process.number
    bad.open({0: {"word": "x"}}, nothing)  # in a fresh process: a thread of the old one hangs for ever
    assert bad._code.process.number == number + 1 and bad.turn({0: "ok"}, nothing)[0].error is None


def test_an_end_of_the_process_fails_all_that_are_open_and_the_next_ones_are_played(runner):
    bad = runner("Bad")
    bad.check(["word"])
    bad.open({i: {"word": "x"} for i in range(3)}, nothing)
    answers = bad.turn({0: "end"}, nothing) | bad.turn({1: "ok"}, nothing) | bad.rewards([2], nothing)
    assert answers[0].error == "ended its process (status 7)"
    assert answers[1].error == answers[2].error == "ended its process"
    bad.open({0: {"word": "x"}}, nothing)
    assert bad.turn({0: "ok"}, nothing)[0].messages[0]["content"] == "fine"


def test_closing_leaves_no_process(runner):
    game = runner("Game")
    game.check(["word"])
    pid = game._code.process._child.pid
    game.close()
    assert gone([pid])


@pytest.mark.parametrize(
    ("name", "columns", "message"),
    [
        ("Gmae", ["word"], "has no Gmae. Did you mean Game?"),
        ("not_a_class", [], "is a value of type int, not a class"),
        ("Wanting", [], r"Wanting\(size\) wants arguments, and it is made without. Give them defaults."),
        ("NoReset", [], r"NoReset has no reset\(\*\*columns\), with which an episode begins. Add it."),
        ("Nothing", [], r"Nothing has no step\(text\) and no public method that is a tool. Add one of them."),
        ("Undescribed", [], "its tool tool cannot be described .*Give it a docstring with Args"),
        ("Unrewarded", [], r"it has no get_reward\(\), and there is no reward function. Add one of them."),
        ("Game", ["prompt"], "reset wants word, and the columns of the data are prompt. Give the parameter a default"),
    ],
)
def test_a_class_that_cannot_be_used_is_refused(runner, name, columns, message):
    with pytest.raises(ConfigError, match=rf"tasks.words.environment = '.*:{name}': .*{message}"):
        runner(name).check(columns)


@pytest.mark.parametrize("environment", ["mine.py", ":Game", "mine.py:not-a-name"])
def test_a_target_that_is_none_is_refused(tmp_path, environment):
    with pytest.raises(ConfigError, match='tasks.*.environment = .*must be "file.py:Class" or "module:Class"'):
        TaskConfig(data=tmp_path, environment=environment)
    with pytest.raises(ConfigError, match="is for a task with data of its own"):
        TaskConfig(environment="a.py:B")


def episode(outcome: Outcome | None, text: str = "yes") -> Response:
    return Response(TaskItem("words", "?", "", {}), text, [1, 2], "response 0", outcome)


SAID = (
    {"role": "assistant", "content": "no"},
    {"role": "user", "content": "?"},
    {"role": "assistant", "content": "yes"},
)


def test_scores_are_the_environments_and_the_functions(folder):
    """2.5 of the environment, and 2 times the 3 letters of the last turn, as TRL's form has the messages; a failed
    episode has what the recipe says, whatever a function thinks of it."""
    functions = (RewardConfig(f"{folder}/mine.py:length", 2.0),)
    config = TaskConfig(data=folder / "x.jsonl", environment=f"{folder}/mine.py:Game", reward=functions, on_error=-1.0)
    messages = TaskItem("words", "?", "", {"prompt": [{"role": "user", "content": "?"}]})
    runner = RewardRunner("words", config, FaultsConfig())
    scorer = EpisodeScorer("words", config, runner)
    try:
        found = scorer.score(
            [
                Response(messages, "no?yes", [1], "a", Outcome(2, SAID, 2.5)),
                Response(messages, "no?yes", [1], "b", Outcome(2, SAID, None)),
                Response(messages, "no?yes", [1], "c", Outcome(1, SAID, 2.5, error="raised X")),
            ],
            lambda done: None,
        )
    finally:
        scorer.close()
    assert found[0] == Score(8.5, {"turns": 2.0, "environment": 2.5, "length": 3.0})
    assert found[1] == Score(6.0, {"turns": 2.0, "length": 3.0})
    assert found[2].reward == -1.0 and found[2].error == "environment Game raised X"


def test_episodes_that_nobody_rewards_or_plays_are_told(folder):
    config = TaskConfig(data=folder / "x.jsonl", environment="a.py:Game", on_error="drop")
    scorer = EpisodeScorer("words", config, None)
    rewarded, unrewarded = episode(Outcome(1, SAID, 0.0)), episode(Outcome(1, SAID, None))
    found = scorer.score([rewarded, unrewarded], lambda done: None)
    assert found[0] == Score(0.0, {"turns": 1.0, "environment": 0.0})
    assert found[1].reward is None and "step() gives none as its third value" in found[1].error
    with pytest.raises(RolloutError, match=r"tasks.words: environment Game gave no reward.* in 2 of 2 episodes"):
        scorer.score([unrewarded, unrewarded], lambda done: None)
    with pytest.raises(RolloutError, match="its environment cannot be asked for one afterwards"):
        scorer.score([episode(None)], lambda done: None)
