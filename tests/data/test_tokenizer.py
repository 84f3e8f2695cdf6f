"""What becomes one token, what is spelled, and that text survives."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from gspo_megatron.backend.model.shape import ModelShape
from gspo_megatron.config import ModelConfig, TaskConfig
from gspo_megatron.data.tokenizer import SPECIAL_TOKENS, load_tokenizer, size_of, train_tokenizer
from gspo_megatron.errors import ConfigError
from gspo_megatron.tasks.mixture import TaskMixture
from tools.validation.round_trip import TINY

TASKS = ("spell_backward", "number_sorting", "chain_sum", "gcd", "word_sorting")


@pytest.fixture(scope="module")
def mixture():
    return TaskMixture({name: TaskConfig() for name in TASKS}, seed=1)


@pytest.fixture(scope="module")
def texts(mixture):
    items = [mixture.item("train", i) for i in range(800)]
    return [text for item in items for text in (item.question, item.answer)]


@pytest.fixture(scope="module")
def tokenizer(texts):
    return train_tokenizer(texts, vocab_size=320)


def pieces(tokenizer, text):
    return [tokenizer.decode([i]) for i in tokenizer.encode(text)]


def test_boilerplate_is_one_token_and_the_word_is_spelled(tokenizer):
    assert pieces(tokenizer, "Spell this word backward (example: sun -> nus): strap") == [
        "Spell this word backward (example: sun -> nus): ",
        *"strap",
    ]


def test_a_word_of_the_boilerplate_is_spelled_when_it_is_the_question(tokenizer):
    assert pieces(tokenizer, "Spell this word backward (example: sun -> nus): example")[1:] == list("example")
    assert pieces(tokenizer, "drawkcab") == list("drawkcab")


def test_digits_and_signs_stay_single_around_a_separator(tokenizer):
    question = "State the final answer to the following arithmetic problem: 859 + 467 - 91 ="
    assert pieces(tokenizer, question) == [
        "State the final answer to the following arithmetic problem: ",
        *"859",
        " + ",
        *"467",
        " - ",
        *"91",
        " ",
        "=",
    ]
    assert pieces(tokenizer, "48.36, -9.1") == [*"48.36", ", ", *"-9.1"]


def test_digits_share_a_token_only_in_the_worked_examples_of_a_task(mixture, tokenizer):
    for item in (mixture.item("eval", i) for i in range(200)):
        for piece in pieces(tokenizer, item.question):
            if any(map(str.isdigit, piece)):
                assert len(piece) == 1 or "use ['-69', '-13'," in piece or "e.g. word_1, word_2" in piece


def test_every_answer_is_spelled_but_for_separators(mixture, tokenizer):
    for item in (mixture.item("eval", i) for i in range(200)):
        long = {piece for piece in pieces(tokenizer, item.answer) if len(piece) > 1}
        assert long <= {", ", "', '"}, item


def test_choice_words_are_tokens_as_whole_words_only(tokenizer):
    assert pieces(tokenizer, "in descending order")[3:4] == ["descending"]
    assert pieces(tokenizer, "condescending") == list("condescending")


@pytest.mark.parametrize(
    ("task", "mean", "most"),
    [("spell_backward", 12, 15), ("number_sorting", 60, 85), ("chain_sum", 20, 36), ("gcd", 13, 15)],
)
def test_prompts_are_short(tokenizer, task, mean, most):
    source = TaskMixture({task: TaskConfig()}, seed=2)
    lengths = [len(tokenizer.encode(source.item("eval", i).question)) + 2 for i in range(100)]
    assert sum(lengths) / 100 <= mean and max(lengths) <= most


@settings(max_examples=150, deadline=None)
@given(st.text() | st.text(alphabet="0123456789 ,+-=<|>\n'Spel thsword123é\u4f60😀\\", max_size=60))
def test_any_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_task_texts_survive(tokenizer, texts):
    for text in texts[:400]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_saved_tokenizer_gives_the_same_ids(tokenizer, texts, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    # Beside a model's config.json, which must not make the reader build another class of tokenizer.
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe", "vocab_size": 320}')
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert [loaded.encode(text) for text in texts[:200]] == [tokenizer.encode(text) for text in texts[:200]]
    assert (loaded.pad_token_id, loaded.eos_token_id, len(loaded)) == (0, 1, len(tokenizer))
    assert loaded.chat_template == tokenizer.chat_template


def test_chat_template(tokenizer):
    question, answer = {"role": "user", "content": "1 + 1\n"}, {"role": "assistant", "content": "2"}
    render = lambda turns, **more: tokenizer.apply_chat_template(turns, tokenize=False, **more)  # noqa: E731
    assert render([question], add_generation_prompt=True) == "<|user|>1 + 1\n<|assistant|>"
    assert render([question, answer]) == "<|user|>1 + 1\n<|assistant|>2<|endoftext|>"
    assert tokenizer.encode("<|user|><|assistant|><|endoftext|>") == [2, 3, 1]
    with pytest.raises(Exception, match="roles system, user, tool and assistant only"):
        render([{"role": "critic", "content": "7"}])
    assert render([{"role": "tool", "content": "7"}]) == "<|user|>7"
    tools = [{"function": {"name": "add"}}, {"function": {"name": "take"}}]
    assert render([question], tools=tools) == "add take <|user|>1 + 1\n"
    assert render([{"role": "system", "content": "be brief"}, question]) == "be brief<|user|>1 + 1\n"


def test_training_is_deterministic_and_ignores_order_and_repetition(texts, tokenizer):
    again = train_tokenizer([*reversed(texts), *texts[:50]], vocab_size=320)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.encode(texts[0]) == tokenizer.encode(texts[0])


def test_vocab_size_is_a_limit_and_the_longest_savings_stay(texts, tokenizer):
    small = train_tokenizer(texts, vocab_size=262)
    assert len(small) == 262 < len(tokenizer) <= 320
    assert set(small.get_vocab()) < set(tokenizer.get_vocab())
    # The two that save most: the instructions of number_sorting (300 characters) and of word_sorting (180).
    assert [len(small.decode([i])) > 150 for i in (260, 261)] == [True, True]
    bare = train_tokenizer(texts[:100], vocab_size=260)
    assert len(bare) == 260 and pieces(bare, texts[0]) == list(texts[0])
    with pytest.raises(ConfigError, match=r"data\.vocab_size = 259: must be at least 260.*Give 320"):
        train_tokenizer(texts, vocab_size=259)


def test_without_repetition_everything_is_bytes():
    assert len(train_tokenizer(["one text", "another one"], vocab_size=320)) == 256 + len(SPECIAL_TOKENS)
    assert len(train_tokenizer([], vocab_size=320)) == 260


def test_content_that_repeats_is_not_boilerplate():
    """An answer that is given a thousand times is one text."""
    sentence = "the quick brown fox jumps over the lazy dog"
    assert len(train_tokenizer([sentence] * 1000, vocab_size=320)) == 260


def test_numbers_and_signs_that_one_side_tells_are_still_spelled():
    # With ten numbers each digit and sign is told by what follows it; only the place before them shows the choice.
    numbers = ["-11.1", "22.2", "-33.3", "44.4", "-55.5", "66.6", "-77.7", "88.8", "-99.9", "10.5"]
    trained = train_tokenizer([f"Sort these numbers now: {a}, {b}" for a in numbers for b in numbers], vocab_size=320)
    assert pieces(trained, "Sort these numbers now: -11.1, -77.7") == [
        "Sort these numbers now: ",
        *"-11.1",
        ", ",
        *"-77.7",
    ]


def test_short_phrases_are_spelled():
    trained = train_tokenizer([f"{a} of {b}" for a in range(10) for b in range(10)], vocab_size=320)
    assert pieces(trained, "3 of 5") == list("3 of 5")


def test_the_longest_segment_wins():
    common = [f"Now convert the base-{n} to ten" for n in range(180)]
    trained = train_tokenizer([*common, *(f"Now convert the {'1' * n} to ten" for n in range(1, 11))], vocab_size=320)
    assert pieces(trained, "Now convert the base-7")[0] == "Now convert the base-"
    assert pieces(trained, "Now convert the 11")[0] == "Now convert the "


def test_an_id_behind_a_gap_needs_a_row_of_the_embedding(tmp_path):
    """260 entries fit an embedding of 320 rows, and id 5000 does not."""
    train_tokenizer([], vocab_size=320).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(TINY["llama"] | {"vocab_size": 320}))
    model = ModelConfig(load_hf=tmp_path)
    assert ModelShape.of(model, size_of(load_tokenizer(tmp_path))).vocab_size == 320
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["s"] = 5000
    path.write_text(json.dumps(content))
    found = load_tokenizer(tmp_path)
    assert found.encode("s") == [5000] and len(found) == 260 and size_of(found) == 5001
    with pytest.raises(ConfigError, match="its tokenizer gives ids up to 5000, and its embedding has 320 rows"):
        ModelShape.of(model, size_of(found))
