"""Where the answer of a response is, by each extractor, and what a scorer then gives."""

import time

import pytest

from gspo_megatron.batch import TaskItem
from gspo_megatron.config import TaskConfig, TrainConfig
from gspo_megatron.errors import ConfigError, RolloutError
from gspo_megatron.recipe import check
from gspo_megatron.recipe.layout import resolve_layout
from gspo_megatron.recipe.load import REPOSITORY, load_recipe
from gspo_megatron.tasks.answers import PATIENCE, AnswerExtractor
from gspo_megatron.tasks.mixture import TaskMixture
from gspo_megatron.tasks.reasoning_gym import is_correct

THOUGHT = "First I look at both numbers, and then I add them. " * 20
SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


@pytest.mark.parametrize(
    ("name", "pattern", "response", "answer"),
    [
        ("none", None, " 7\n", " 7\n"),
        ("last_line", None, "3 + 4\n  7 \n\n", "7"),
        ("last_line", None, " \n\n", None),
        ("answer_tag", None, "<answer>6</answer> no: <answer>\n7 </answer>.", "7"),
        ("answer_tag", None, "<answer> of <answer>7</answer>", "7"),
        ("answer_tag", None, "<answer>6</answer> <answer>7", "6"),  # the second is not closed
        ("answer_tag", None, "7</answer> <answer>", None),
        ("answer_tag", None, "7", None),
        ("boxed", None, r"$\boxed{6}$, no: $\boxed{ \frac{7}{8} }$.", r"\frac{7}{8}"),
        ("boxed", None, r"\boxed{\{7, 8\}}", r"\{7, 8\}"),
        ("boxed", None, r"\boxed{\}7}", r"\}7"),
        ("boxed", None, r"\boxed{6} and \boxed{\frac{7}{8}", None),  # cut in the last one
        ("boxed", None, "7", None),
        ("regex", "#### (.+)", "#### 6\n#### 7 \nso be it", "7"),
        ("regex", r"-?\d+", "3 + 4 = 7.", "7"),
        ("regex", r"(?:is|=) *(-?\d+)", "it is -7", "-7"),
        ("regex", "#### (.+)", "7", None),
        ("regex", "(7)?x", "x", None),  # a group that took no part
    ],
)
def test_the_last_answer_counts(name, pattern, response, answer):
    assert AnswerExtractor(name, pattern).find(response) == answer


@pytest.mark.parametrize("name", ["last_line", "answer_tag", "boxed"])
@pytest.mark.parametrize("text", ["<answer>" * 20_000, "\\boxed{" * 20_000, "{" * 100_000, "\n" * 100_000])
def test_no_text_takes_long(name, text):
    start = time.perf_counter()
    AnswerExtractor(name).find(text)
    assert time.perf_counter() - start < 1


def test_a_pattern_that_takes_for_ever_finds_nothing():
    """(a|a)*b on 60 letters a tries 2^60 ways."""
    start = time.perf_counter()
    assert AnswerExtractor("regex", "(?:a|aa)+$").find("a" * 60 + "!") is None
    assert time.perf_counter() - start < 5 * PATIENCE


@pytest.fixture(scope="module")
def seven() -> TaskItem:
    """A sum whose answer is 7."""
    mixture = TaskMixture({"chain_sum": TaskConfig(options=SUMS)}, 1)
    return next(item for item in (mixture.item("train", i) for i in range(500)) if item.answer == "7")


@pytest.mark.parametrize(
    ("options", "response"),
    [
        ({"answer_extractor": "regex", "answer_pattern": "#### (.+)"}, "#### 7"),
        ({"answer_extractor": "last_line"}, THOUGHT + "\n7"),
        ({"answer_extractor": "answer_tag"}, f"<think>{THOUGHT}</think> <answer>7</answer>"),
        ({"answer_extractor": "boxed"}, THOUGHT + r"The answer is $\boxed{7}$."),
        ({"answer_extractor": "regex", "answer_pattern": r"-?\d+"}, "The answer is 7."),
    ],
)
def test_thought_before_the_answer_costs_nothing(seven, options, response):
    """Judged as a whole, the shortest of these earns 1/6 (a letter of six) and the longest under 1/1000."""
    whole = TaskMixture({"chain_sum": TaskConfig(options=SUMS)}, 1)
    chosen = TaskMixture({"chain_sum": TaskConfig(options=SUMS, **options)}, 1)
    assert whole.score(seven, response) < 0.17
    assert chosen.score(seven, response) == 1.0
    assert chosen.score(seven, response.replace("7", "8")) < 0.5
    assert chosen.score(seven, "I do not know") == 0.0


def test_the_whole_response_is_judged_unless_a_task_names_an_extractor(seven):
    """len("7") / len("#### 7") is reasoning-gym's own partial credit."""
    assert TaskMixture({"chain_sum": TaskConfig(options=SUMS)}, 1).score(seven, "#### 7") == pytest.approx(1 / 6)


@pytest.mark.parametrize("name", ["none", "last_line", "answer_tag", "boxed"])
def test_the_gold_response_of_a_warm_start_is_what_the_extractor_finds(name, seven):
    mixture = TaskMixture({"chain_sum": TaskConfig(options=SUMS, answer_extractor=name)}, 1)
    assert mixture.score(seven, mixture.gold_response(seven)) == 1.0


def test_an_extractor_that_cannot_find_the_gold_answer_is_refused():
    """Answers of spiral matrices are lines of numbers; binary matrices have several lines."""
    with pytest.raises(ConfigError, match="tasks.binary_matrix.answer_extractor = 'last_line': finds .*Choose another"):
        TaskMixture({"binary_matrix": TaskConfig(answer_extractor="last_line")}, 1)


def test_a_pattern_that_wants_words_has_no_warm_start(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("tasks: {lcm: {answer_extractor: regex, answer_pattern: '#### (.+)'}}\nparallel: {}\n")
    config = load_recipe([str(recipe)])
    with pytest.raises(ConfigError, match="tasks.lcm.answer_extractor = 'regex': finds None .*warm_start.steps 0"):
        check.check(config, resolve_layout(config, 1, has_cuda=False), 1)
    config = load_recipe([str(recipe), "--warm-start.steps", "0"])
    check.check(config, resolve_layout(config, 1, has_cuda=False), 1)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"answer_extractor": "regex"}, "answer_pattern = None: belongs to answer_extractor regex"),
        ({"answer_extractor": "boxed", "answer_pattern": "7"}, "answer_pattern = '7': belongs to"),
        ({"answer_extractor": "regex", "answer_pattern": "(7"}, "not a regular expression"),
        ({"answer_extractor": "regex", "answer_pattern": "(7)(8)"}, "at most one group"),
    ],
)
def test_a_pattern_that_cannot_work_is_refused(options, told):
    with pytest.raises(ConfigError) as error:
        TaskConfig(**options)
    assert told in str(error.value)


class Fixed:
    """A scorer that gives full marks to the gold answer, and a number to anything else."""

    def __init__(self, dataset, number: float):
        self.dataset, self.number = dataset, number

    def score_answer(self, text, entry):
        return 1.0 if text == entry["answer"] else self.number


@pytest.mark.parametrize(
    ("raw", "reward", "right"),
    [
        (1.2, 1.2, True),  # a bonus for the format
        (3.0, 3.0, True),
        (-2.5, -2.5, False),
        (1 + 2e-16, 1 - 2**-53, False),  # partial credits that were added up
        (1 + 5e-10, 1 - 2**-53, False),
        (1 + 2e-9, 1 + 2e-9, True),
        (1e30, 1e30, True),
    ],
)
def test_a_reward_may_be_any_finite_number(monkeypatch, seven, raw, reward, right):
    mixture = TaskMixture({"chain_sum": TaskConfig(options=SUMS)}, 1)
    monkeypatch.setattr(mixture.tasks["chain_sum"], "_dataset", Fixed(mixture.tasks["chain_sum"]._dataset, raw))
    assert mixture.score(seven, "something") == reward
    assert is_correct(mixture.score(seven, "something")) is right


@pytest.mark.parametrize("raw", [1e31, -1e300])
def test_a_reward_that_would_overflow_later_is_refused(monkeypatch, seven, raw):
    mixture = TaskMixture({"chain_sum": TaskConfig(options=SUMS)}, 1)
    monkeypatch.setattr(mixture.tasks["chain_sum"], "_dataset", Fixed(mixture.tasks["chain_sum"]._dataset, raw))
    with pytest.raises(RolloutError, match=r"within 1e\+30"):
        mixture.score(seven, "something")


def test_the_recipe_of_the_pretrained_model_judges_the_last_number():
    config: TrainConfig = load_recipe([str(REPOSITORY / "examples/recipes/smollm2_moe_gspo.yaml")])
    mixture = TaskMixture(config.tasks, config.seed)
    item = mixture.item("train", 0)
    assert mixture.score(item, f"The final answer is {item.answer}.") == 1.0
