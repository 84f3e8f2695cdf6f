"""Records of rollouts: what is read back is what was written, and every bad record is refused with file and line."""

import dataclasses
import json
import math
import random
import struct

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from gspo_megatron.batch import Completion, Prompt, RolloutGroup, Score, TaskItem, Turns
from gspo_megatron.config import AlgorithmConfig, Layout, MismatchConfig, RolloutConfig, TrainConfig
from gspo_megatron.errors import ConfigError
from gspo_megatron.models.families import architecture
from gspo_megatron.rollout.record_files import RecordFiles, check_together
from gspo_megatron.rollout.record_limits import Limits, has_gap
from gspo_megatron.rollout.records import GroupRecord, Sampling, record_of
from tools.validation.launching import ROOT

LIMITS = Limits(
    tasks=("sums",),
    group_size=2,
    temperature=0.7,
    max_response_length=4,
    vocab_size=100,
    longest=6,
    why_longest="max_position_embeddings of the model is 6, max_tokens_per_microbatch 9",
    tokenizer="abc",
)
RESPONSE = {"token_ids": [5, 6, 7], "logprobs": [-0.5, -0.25, 0], "reward": 1.0, "finish_reason": "stop"}
GROUP = {
    "uid": 0,
    "task": "sums",
    "prompt": "What is 1 + 1?",
    "prompt_ids": [1, 2],
    "answer": "2",
    "columns": {"level": 3},
    "version": 0,
    "tokenizer": "abc",
    "sampling": {"temperature": 0.7, "top_k": 0, "top_p": 1.0, "max_response_length": 4},
    "responses": [RESPONSE, RESPONSE | {"reward": 0.0, "finish_reason": "length"}],
}


def group(uid: int = 0, **changes) -> dict:
    return {name: value for name, value in (GROUP | {"uid": uid} | changes).items() if value is not ...}


def response(**changes) -> dict:
    """A group whose second response has these fields."""
    other = {name: value for name, value in (RESPONSE | changes).items() if value is not ...}
    return group(responses=[RESPONSE, other])


def written(folder, *lines) -> RecordFiles:
    """The groups of a file after two good ones and an empty line."""
    path = folder / "groups.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in (group(8), group(9), "", *lines)]
    path.write_text("\n".join(texts) + "\n")
    return RecordFiles(path, 99, LIMITS)


SAMPLED = GROUP["sampling"]
TURNS = {"starts": [0, 2], "rewards": [0.5, 0.0]}
BAD = {
    "no JSON": ('{"uid": 1,', "not valid JSON"),
    "no object": ("[1]", "must be a JSON object"),
    "NaN": (json.dumps(response(logprobs=[-0.5, math.nan, 0.0])), "holds NaN or Infinity"),
    "missing": (group(tokenizer=...), "tokenizer is missing"),
    "null": (group(version=None), "version is missing"),
    "unknown": (response(log_probs=[0.0]), "responses[1].log_probs is no field of a record. Did you mean logprobs?"),
    "uid of text": (group(uid="7"), "uid = '7' must be an integer of 0 or more"),
    "uid below 0": (group(uid=-1), "uid = -1 must be an integer of 0 or more"),
    "uid too large": (group(uid=2**63), "must be an integer of 0 or more"),
    "version a switch": (group(version=True), "version = True must be an integer"),
    "another task": (group(task="products"), "task = 'products' is none of the recipe's, sums"),
    "prompt empty": (group(prompt=" "), "prompt = ' ' is empty"),
    "prompt a number": (group(prompt=3), "prompt = 3 must be a text or a list of messages"),
    "prompt without role": (group(prompt=[{"content": "x"}]), "prompt[0].role = None must be one of"),
    "prompt_ids empty": (group(prompt_ids=[]), "prompt_ids = [] is empty"),
    "prompt_ids above": (group(prompt_ids=[1, 100]), "prompt_ids[1] = 100 must be below 100, the model's vocabulary"),
    "token a text": (response(token_ids=[5, "6", 7]), "responses[1].token_ids[1] = '6' must be a token id"),
    "token a float": (response(token_ids=[5, 6.0, 7]), "responses[1].token_ids[1] = 6.0 must be a token id"),
    "token below 0": (response(token_ids=[5, 6, -1]), "responses[1].token_ids[2] = -1 must be a token id"),
    "token above": (response(token_ids=[5, 100, 7]), "responses[1].token_ids[1] = 100 must be below 100"),
    "no tokens": (response(token_ids=[], logprobs=[]), "responses[1].token_ids = [] is empty"),
    "tokens a text": (response(token_ids="5 6 7"), "responses[1].token_ids = '5 6 7' must be a list of token ids"),
    "logprobs short": (response(logprobs=[-0.5]), "responses[1].logprobs has 1 log-probs for 3 tokens"),
    "logprob above 0": (response(logprobs=[-0.5, 0.1, 0.0]), "responses[1].logprobs[1] = 0.1 must be a finite number"),
    "logprob infinite": (
        json.dumps(response(logprobs=[-0.5, 1, 0])).replace(" 1,", " -1e999,"),
        "responses[1].logprobs[1] = -inf must be a finite number, 0 or less",
    ),
    "mask long": (response(loss_mask=[1, 1, 1, 1]), "responses[1].loss_mask has 4 numbers for 3 tokens"),
    "mask of 2": (response(loss_mask=[1, 2, 1]), "responses[1].loss_mask[1] = 2 must be 0 or 1"),
    "reward a text": (response(reward="1"), "responses[1].reward = '1' must be a finite number"),
    "reward too large": (
        json.dumps(response(reward=1.5)).replace("1.5", "1e999"),
        "responses[1].reward = inf must be a finite number",
    ),
    "reward of 400 digits": (response(reward=10**400), "must be a finite number"),
    "part a text": (response(parts={"length": "x"}), "responses[1].parts.length = 'x' must be a finite number"),
    "some rewards": (response(reward=...), "responses[1] has no reward, and others of its group have one"),
    "reason": (response(finish_reason="eos"), "responses[1].finish_reason = 'eos' must be stop or length"),
    "no reason": (response(finish_reason=...), "responses[1].finish_reason is missing"),
    "no responses": (group(responses=[]), "responses must be a list with one response or more"),
    "response a text": (group(responses=["x", "y"]), "responses[0] = 'x' must be a JSON object"),
    "group size": (group(responses=[RESPONSE] * 3), "3 responses, and rollout.group_size is 2"),
    "another tokenizer": (group(tokenizer="abd"), "tokenizer = 'abd' is another vocabulary than the model's, abc"),
    "temperature": (group(sampling=SAMPLED | {"temperature": 1.0}), "temperature = 1 is not rollout.temperature = 0.7"),
    "sampling": (group(sampling={"temperature": 0.7}), "sampling.top_k is missing"),
    "too long": (response(token_ids=[5] * 5, logprobs=...), "has 5 tokens, and rollout.max_response_length is 4"),
    "beyond the positions": (
        group(prompt_ids=[1] * 4),
        "prompt_ids and responses[0] have 7 tokens, and 6 fit (max_position_embeddings of the model is 6",
    ),
    "routes": (group(routes={"file": "x"}), "routes.key is missing"),
    "turns a list": (response(turns=[0]), "responses[1].turns = [0] must be a JSON object"),
    "turns without rewards": (response(turns={"starts": [0]}), "responses[1].turns.rewards is missing"),
    "turns unknown": (response(turns=TURNS | {"ends": [1]}), "responses[1].turns.ends is no field of a record"),
    "no turn": (response(turns={"starts": [], "rewards": []}), "turns: starts = [] must begin with 0"),
    "turns from 1": (response(turns=TURNS | {"starts": [1, 2]}), "turns: starts = [1, 2] must begin with 0"),
    "turns twice": (response(turns=TURNS | {"starts": [0, 0]}), "turns: starts[0] = 0 must be below the next one"),
    "turns behind": (
        response(turns=TURNS | {"starts": [0, 3]}),
        "turns: starts[1] = 3 must be below the next one and 3",
    ),
    "turns a text": (response(turns=TURNS | {"starts": [0, "2"]}), "turns.starts[1] = '2' must be an integer of 0"),
    "turn rewards": (response(turns=TURNS | {"rewards": [1.0]}), "turns: 1 rewards for 2 starts, must be one a turn"),
    "turn reward none": (response(turns=TURNS | {"rewards": [1.0, None]}), "turns.rewards[1] = None must be a finite"),
    "turns rewarded alone": (
        group(responses=[{**RESPONSE, "reward": None, "turns": {"starts": [0, 2], "rewards": [1.0, 0.0]}}] * 2),
        "responses[0] has rewards of its turns and no reward, which would contain them",
    ),
    "versions": (response(versions=[1, -2]), "responses[1].versions[1] = -2 must be an integer of 0 or more"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_record_is_refused_with_file_and_line(kind, tmp_path):
    line, says = BAD[kind]
    files = written(tmp_path, group(1), line)
    with pytest.raises(ConfigError) as error:
        files.judge(0)
    assert f"rollout.path = '{tmp_path}/groups.jsonl, line 5': " in str(error.value) and says in str(error.value)
    assert str(error.value).endswith((".", "?"))
    if isinstance(line, dict):  # of a file whose lines are JSON, the good ones before it
        assert len(files.read(0, 3)) == 3


@pytest.mark.parametrize("line", [group(9), group(3, responses=[RESPONSE | {"logprobs": None}] * 2)])
def test_groups_that_are_good_one_by_one_and_not_together(line, tmp_path):
    with pytest.raises(ConfigError, match="line 4': (uid = 9 is that of .*, line 2 too|has no logprobs, other than)"):
        check_together(written(tmp_path, line).judge(0))


def test_fields_that_may_be_left_out():
    bare = {"token_ids": [5], "finish_reason": "stop"}
    read = GroupRecord.read(group(answer=..., columns=..., responses=[bare, bare]))
    made = read.group(["x", "y"])
    assert not made.prompt.item.has_answer and made.prompt.item.entry == {} and made.scores == []
    assert [one.logprobs for one in made.completions] == [None, None] == [one.loss_mask for one in made.completions]


def test_a_group_comes_back_to_the_bit():
    """Floats of every size; entries with what JSON has no word for, and half of a surrogate pair in a text."""
    draw = random.Random(1)
    floats = [struct.unpack("<d", draw.randbytes(8))[0] for _ in range(2000)]
    floats = [-abs(x) for x in floats if math.isfinite(x)] + [-5e-324, -0.1, 0.0]
    fp32 = (-np.random.default_rng(1).random(500, dtype=np.float32)).tolist()
    entry = {"pair": (1, 2), "seven": np.int64(7), "nan": math.nan, "of": {"a"}, 5: np.float32(0.5), "yes": True}
    messages = ({"role": "system", "content": "Ä"}, {"role": "user", "content": "x"})
    item = TaskItem("sums", "Ä\n\nx", "2", entry, messages=messages)
    answers = [
        Completion(list(range(len(floats))), floats, False, versions=(3,)),
        Completion(
            [9] * 500,
            fp32,
            True,
            loss_mask=[1, 0] * 250,
            versions=(3, 5),
            turns=Turns((0, 2, 4), (0.1 + 0.2, 0.0, -1e-300)),
        ),
    ]
    scores = [Score(0.1 + 0.2, {"f/g": 1 / 3}), Score(None, {}, "it raised '\udc80'")]
    given = RolloutGroup(Prompt(7, item, [1, 2]), answers, scores, ["a", "b"])
    record = record_of(given, "abc", Sampling(0.7, 0, 1.0, 4))
    line = record.line()
    read = GroupRecord.read(json.loads(line))
    back = read.group(given.texts)
    assert line.count(b"\n") == 1 and read.line() == line and read.version == 3
    assert [one.versions for one in read.responses] == [None, [3, 5]]
    assert back.completions == answers and back.scores == scores and back.is_kept == [True, False]
    assert back.prompt.token_ids == [1, 2] and back.prompt.uid == 7 and back.prompt.item.messages == messages
    assert back.prompt.item.question == item.question and back.prompt.item.answer == "2"
    expected = {"pair": [1, 2], "seven": 7, "nan": None, "of": ["a"], "5": 0.5, "yes": True}
    assert back.prompt.item.entry == expected


def test_files_of_a_folder_are_read_in_order_from_any_place(tmp_path):
    """Two of JSONL around one of Parquet and an empty one; other files are none of them."""
    for name, uids in (("a.jsonl", (5, 3)), ("c.jsonl", (1,)), ("d.jsonl", ())):
        (tmp_path / name).write_text("".join(json.dumps(group(uid)) + "\n" for uid in uids))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([group(9), group(2)]), tmp_path / "b.parquet")
    (tmp_path / "notes.txt").write_text("no group")
    files = RecordFiles(tmp_path, 5, LIMITS)
    assert [one.uid for one in files.read(0, 5)] == [5, 3, 9, 2, 1]
    assert [one.uid for one in files.read(1, 3)] == [3, 9] and files.read(2, 3) == [GroupRecord.read(group(9))]
    assert [one.uid for one in files.judge(1)] == [3, 9, 2, 1]
    assert [one.uid for rank in (0, 1) for one in files.judge(0, rank, 2)] == [5, 3, 1, 9, 2]
    # Of a file that the steps do not reach to the end, the rest is not looked at.
    (tmp_path / "c.jsonl").write_text("no JSON\n")
    assert len(RecordFiles(tmp_path, 4, LIMITS).judge(0)) == 4


def test_a_bad_row_of_parquet_is_named_by_its_number(tmp_path):
    rows = [group(1), group(2, responses=[RESPONSE, RESPONSE | {"logprobs": [-0.5, math.inf, 0.0]}])]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    with pytest.raises(ConfigError, match=r"x.parquet, row 2': responses\[1\].logprobs\[1\] = inf must be"):
        RecordFiles(tmp_path / "x.parquet", 2, LIMITS).judge(0)


def test_a_file_that_changes_under_a_run_is_told(tmp_path):
    files = written(tmp_path)
    (tmp_path / "groups.jsonl").write_text(json.dumps(group(8)) + "\n")
    with pytest.raises(ConfigError, match="has 1 groups, and had 2 when the run was started"):
        files.read(0, 1)


@pytest.mark.parametrize(
    ("algorithm", "says"),
    [
        (AlgorithmConfig(old_logprobs="rollout"), "which algorithm.old_logprobs = rollout needs"),
        (AlgorithmConfig(mismatch=MismatchConfig("token_masked")), "which algorithm.mismatch.correction = token_m"),
        (AlgorithmConfig(), None),
    ],
)
def test_limits_of_a_recipe(algorithm, says, tmp_path):
    """Log-probs may be missing where nothing needs them. Sequences are padded to a multiple of twice the context."""
    rollout = RolloutConfig(group_size=2, max_response_length=4, temperature=0.7)
    config = TrainConfig(algorithm=algorithm, rollout=rollout, max_tokens_per_microbatch=99)
    hf = json.loads((ROOT / "examples/models/qwen3_moe_tiny/config.json").read_text())
    shape = architecture(hf | {"vocab_size": 100})
    limits = Limits.of(config.resolved(Layout(1, 1, None, 1, 1, context_parallel_size=2)), shape, "abc")
    assert limits.longest == 96 and limits.tasks == {"spell_backward"} and limits.vocab_size == 100
    limits = dataclasses.replace(limits, tasks=("sums",))
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(group(responses=[RESPONSE | {"logprobs": None}] * 2)) + "\n")
    files = RecordFiles(path, 1, limits)
    if says is None:
        assert not files.judge(0)[0].has_logprobs
    else:
        with pytest.raises(ConfigError, match=says):
            files.judge(0)


@pytest.mark.parametrize("has_turns", [True, False])
def test_advantages_by_turn_need_the_turns_of_a_response_that_others_wrote_into(has_turns, tmp_path):
    """Others' tokens at its beginning or end alone are no sign of several turns."""
    limits = dataclasses.replace(LIMITS, wants_turns=True)
    one = RESPONSE | {"loss_mask": [0, 1, 0]}
    several = RESPONSE | {"loss_mask": [1, 0, 1]} | ({"turns": TURNS} if has_turns else {})
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(group(responses=[one, several])) + "\n")
    if has_turns:
        assert RecordFiles(path, 1, limits).judge(0)
    else:
        with pytest.raises(ConfigError, match=r"responses\[1\] has a loss_mask with 0 between .* and no turns, which"):
            RecordFiles(path, 1, limits).judge(0)
    assert RecordFiles(path, 1, LIMITS).judge(0)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [(None, False), ([], False), ([1, 1, 1], False), ([0, 1, 1, 0], False), ([1, 0, 1], True), ([0, 1, 0, 0, 1], True)],
)
def test_a_gap_between_two_turns(mask, expected):
    """Whatever holds the numbers: other systems hand over lists of floats, and arrays."""
    assert has_gap(mask) == expected
    if mask is not None:
        assert has_gap([float(value) for value in mask]) == has_gap(np.array(mask)) == expected
