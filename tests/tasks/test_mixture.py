"""The mixture: whose turn a question is, and what the recipe puts around it."""

import json
from collections import Counter

import pytest

from gspo_megatron.batch import Response, Score
from gspo_megatron.config import AnswerConfig, RewardConfig, TaskConfig
from gspo_megatron.errors import ConfigError
from gspo_megatron.tasks.mixture import TaskMixture

REWARD = (RewardConfig("rewards.py:f"),)


@pytest.fixture
def rows(tmp_path):
    """100 questions q0 ... q99, and 10 held-out ones."""
    for name, numbers in (("train", range(100)), ("eval", range(100, 110))):
        lines = (json.dumps({"prompt": f"q{number}", "answer": number}) for number in numbers)
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return {"data": tmp_path / "train.jsonl", "eval_data": tmp_path / "eval.jsonl", "reward": REWARD}


def test_tasks_are_drawn_by_weight_and_the_order_of_the_recipe_does_not_matter():
    tasks = {"gcd": TaskConfig(weight=3.0), "chain_sum": TaskConfig(weight=1.0)}
    mixed = TaskMixture(tasks, seed=1)
    drawn = Counter(mixed.item("train", i).task for i in range(2000))
    assert drawn["gcd"] == pytest.approx(1500, abs=80)  # 4 standard deviations
    turned = TaskMixture(dict(reversed(tasks.items())), seed=1)
    assert [turned.item("train", i) for i in range(9)] == [mixed.item("train", i) for i in range(9)]


def test_rows_follow_each_other_whatever_is_drawn_between_them(rows):
    """Of the first 300 questions those of the data are every row once, then every row once more in another order; so it
    is alone, and whichever question is asked for first."""
    tasks = {"mine": TaskConfig(**rows), "gcd": TaskConfig(weight=0.5)}
    mixed, alone = TaskMixture(tasks, seed=1), TaskMixture({"mine": TaskConfig(**rows)}, seed=1)
    drawn = [mixed.item("train", i) for i in range(300)]
    mine = [item for item in drawn if item.task == "mine"]
    assert 170 < len(mine) < 240 and {item.task for item in drawn} == {"mine", "gcd"}
    assert sorted(item.question for item in mine[:100]) == sorted(f"q{i}" for i in range(100))
    assert [item.epoch for item in mine] == [i // 100 for i in range(len(mine))]
    assert mine == [alone.item("train", i) for i in range(len(mine))]
    assert TaskMixture(tasks, seed=1).item("train", 299) == drawn[299]


def test_the_system_prompt_and_template_arguments_come_to_every_question(rows, tmp_path):
    plain = {"role": "user", "content": "q100"}
    own = {"role": "system", "content": "mine"}
    (tmp_path / "eval.jsonl").write_text(
        "\n".join(json.dumps({"prompt": prompt}) for prompt in ("q100", [plain], [own, plain]))
    )
    options = {"system_prompt": "be brief", "chat_template_kwargs": {"enable_thinking": False}}
    mixture = TaskMixture({"mine": TaskConfig(**rows, **options)}, seed=1)
    items = [mixture.item("eval", i) for i in range(3)]
    ours = ({"role": "system", "content": "be brief"}, plain)
    assert [item.conversation for item in items] == [ours, ours, (own, plain)]
    assert all(item.template_kwargs == {"enable_thinking": False} for item in items)
    generated = TaskMixture({"gcd": TaskConfig(**options)}, seed=1).item("train", 0)
    assert [message["role"] for message in generated.conversation] == ["system", "user"]


@pytest.mark.parametrize(
    ("extractor", "last", "is_found"),
    [
        ("none", "It is 3.", True),
        ("boxed", "So it is \\boxed{3}.", True),
        ("boxed", "3", False),
        ("answer_tag", "<answer>3</answer>", True),
        ("answer_tag", "3", False),
        ("last_line", "thus\n3", True),
    ],
)
def test_the_last_message_of_a_gold_episode_has_what_the_extractor_reads(tmp_path, extractor, last, is_found):
    """It is trained as it stands: one in which nothing is found would teach an answer that scores nothing."""
    said = [{"role": "assistant", "content": last}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"prompt": f"q{i}", "gold": said}) + "\n" for i in range(20)))
    config = TaskConfig(
        data=tmp_path / "a.jsonl",
        answer=AnswerConfig("gold"),
        answer_extractor=extractor,
        reward=(RewardConfig("m:f"),),
    )
    mixture = TaskMixture({"t": config}, seed=1)
    item = mixture.item("warm_start", 0)
    if is_found:
        assert mixture.gold_response(item) == last
        return
    with pytest.raises(
        ConfigError, match=f"tasks.t.answer_extractor = '{extractor}': finds no answer in '3', the last"
    ):
        mixture.gold_response(item)


class Lengths:
    """Scores a response by its length; none for an empty one."""

    def score(self, responses, told):
        told(len(responses))
        return [Score(float(len(response.text)) or None) for response in responses]

    def close(self):
        pass


def test_scores_come_back_in_the_order_of_the_responses(rows):
    tasks = {"mine": TaskConfig(**rows, correct_at=2.0), "spell_backward": TaskConfig()}
    mixture = TaskMixture(tasks, seed=1, rewards={"mine": Lengths()})
    mine = next(item for i in range(50) if (item := mixture.item("train", i)).task == "mine")
    spelled = next(item for i in range(50) if (item := mixture.item("train", i)).task == "spell_backward")
    told: list[int] = []
    asked = [(mine, "ab"), (spelled, spelled.answer), (mine, ""), (mine, "a")]
    scores = mixture.score_all([Response(item, text, []) for item, text in asked], told.append)
    assert [score.reward for score in scores] == [2.0, 1.0, None, 1.0]
    assert told == [3, 4]
    right = [mixture.is_correct(item, score.reward) for (item, _), score in zip(asked, scores, strict=True)]
    assert right == [True, True, False, False]


def test_wrong_arguments():
    mixture = TaskMixture({"gcd": TaskConfig()}, seed=1)
    for split, index in (("test", 0), ("train", -1)):
        with pytest.raises(ValueError, match="split must be one of"):
            mixture.item(split, index)
    with pytest.raises(ConfigError, match="must name at least one task"):
        TaskMixture({}, seed=1)


def test_other_weights_from_a_place_of_the_stream_on_lose_and_repeat_no_row(rows, tmp_path):
    """Up to question 60 it is the stream of the first weights. Behind it the rows go on where they are: over the change
    each of the 100 comes once before any comes again; and nothing that is held out moves."""
    first = {"mine": TaskConfig(**rows), "gcd": TaskConfig()}
    second = {"mine": TaskConfig(**rows, weight=9.0), "gcd": TaskConfig()}
    before, after = TaskMixture(first, seed=1), TaskMixture(second, seed=1)
    after.weights_were([(60, {"mine": 1.0, "gcd": 1.0})])
    drawn = [after.item("train", i) for i in range(200)]
    assert drawn[:60] == [before.item("train", i) for i in range(60)]
    mine = [item for item in drawn if item.task == "mine"]
    assert sum(item.task == "mine" for item in drawn[60:]) == pytest.approx(126, abs=12)
    assert len({item.question for item in mine[:100]}) == 100
    assert [item.epoch for item in mine] == [i // 100 for i in range(len(mine))]
    assert [after.item("eval", i) for i in range(9)] == [before.item("eval", i) for i in range(9)]
    assert [after.item("warm_start", i) for i in range(9)] == [before.item("warm_start", i) for i in range(9)]
    plain = TaskMixture(second, seed=1)
    assert [plain.item("train", i) for i in range(60)] != drawn[:60]
    third = TaskMixture(second, seed=1)
    third.weights_were([(60, {"mine": 1.0, "gcd": 1.0}), (100, {"mine": 9.0, "gcd": 1.0})])
    assert [third.item("train", i) for i in range(200)] == drawn
