"""What a chat template really writes is what is trained on: the texts are written out by hand."""

import pytest

from gspo_megatron.data.chat import example_tokens, question_tokens, turn_end
from gspo_megatron.errors import ConfigError, RolloutError
from tests.data.templates import (
    CHATML,
    DATED,
    DEAF,
    DROPPED,
    GLM,
    GPT_OSS,
    LOUD,
    PLAIN,
    QWEN3,
    STRICT,
    THINKING,
    tokenizer,
)


def trained(template: str, answer: str, eos: str, stops: tuple[str, ...]) -> tuple[str, str]:
    """(prompt, response) of an example, as text with the special tokens."""
    made = tokenizer(template, eos)
    ids = tuple(made.convert_tokens_to_ids(list(stops)))
    prompt, response = example_tokens(made, ids, "Capital?", answer, "line 1")
    assert prompt == question_tokens(made, "Capital?")
    return made.decode(prompt), made.decode(response)


ENDED = ("Paris<|im_end|>", "Paris<|im_end|>\n", "Paris<|im_end|><|im_end|>")


@pytest.mark.parametrize(
    ("template", "eos", "stops", "prompt", "response"),
    [
        (QWEN3, "<|im_end|>", ("<|im_end|>", "<|endoftext|>"), "<|im_start|>user\nCapital?<|im_end|>\n"
         "<|im_start|>assistant\n", "<think>\n\n</think>\n\nParis<|im_end|>"),
        (GPT_OSS, "<|return|>", ("<|return|>", "<|endoftext|>"), "<|start|>user<|message|>Capital?<|end|>"
         "<|start|>assistant", "<|channel|>final<|message|>Paris<|return|>"),
        (CHATML, "<|endoftext|>", ("<|im_end|>", "<|endoftext|>"), "<|im_start|>user\nCapital?<|im_end|>\n"
         "<|im_start|>assistant\n", "Paris<|im_end|>"),
        (GLM, "<|endoftext|>", ("<|endoftext|>", "<|user|>", "<|observation|>"),
         "[gMASK]<sop><|user|>\nCapital?<|assistant|>", "\nParis<|user|>"),
        (GLM, "<|endoftext|>", ("<|endoftext|>",), "[gMASK]<sop><|user|>\nCapital?<|assistant|>",
         "\nParis<|endoftext|>"),
        (PLAIN, "<|endoftext|>", ("<|endoftext|>",), "user: Capital?\nassistant: ", "Paris\n<|endoftext|>"),
    ],
    ids=["Qwen3", "gpt-oss", "ChatML base", "GLM", "GLM without its stop tokens", "no special token at all"],
)  # fmt: skip
def test_the_response_is_what_the_template_writes_behind_the_prompt(template, eos, stops, prompt, response):
    assert trained(template, "Paris", eos, stops) == (prompt, response)


@pytest.mark.parametrize("answer", ENDED)
def test_an_answer_that_ends_with_the_end_token_gets_it_once(answer):
    assert trained(CHATML, answer, "<|endoftext|>", ("<|im_end|>", "<|endoftext|>"))[1] == "Paris<|im_end|>"


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (QWEN3, "<|im_end|>"),
        (GPT_OSS, "<|return|>"),
        (CHATML, "<|im_end|>"),
        (GLM, None),
        (PLAIN, None),
        (STRICT, None),
    ],
)
def test_the_token_behind_an_answer(template, end):
    made = tokenizer(template)
    assert turn_end(made) == (end and made.convert_tokens_to_ids(end))


@pytest.mark.parametrize(
    ("template", "answer", "error", "words"),
    [
        (
            THINKING,
            "Paris",
            ConfigError,
            r"does not begin with the prompt of a rollout, which goes on with '<think>\n'",
        ),
        (DEAF, "Paris", ConfigError, "writes nothing for an answer (line 1)"),
        (DROPPED, "Paris", ConfigError, "does not write the answer 'gspoanswer' as it is (line 1)"),
        (LOUD, "Paris", ConfigError, "does not write the answer 'gspoanswer' as it is (line 1)"),
        (STRICT, "Paris", RolloutError, "a conversation of user, assistant ends it with TemplateError: users only"),
        (CHATML, "Pa<|im_end|>ris", RolloutError, "line 1: the answer has '<|im_end|>' before its end"),
    ],
)
def test_what_cannot_be_trained_on_is_said(template, answer, error, words):
    with pytest.raises(error) as caught:
        trained(template, answer, "<|endoftext|>", ("<|im_end|>", "<|endoftext|>"))
    assert words in str(caught.value)


def test_of_several_templates_the_default_one_counts():
    """A tokenizer with named templates has a dict of them. This one writes no end of an answer."""
    made = tokenizer(PLAIN)
    plain = example_tokens(made, (made.eos_token_id,), "Capital?", "Paris", "pairs")
    made.chat_template = {"default": PLAIN, "tool_use": CHATML}
    assert example_tokens(made, (made.eos_token_id,), "Capital?", "Paris", "pairs") == plain
    made.chat_template = {"rag": CHATML}
    with pytest.raises(RolloutError, match="a conversation of user ends it with ValueError"):
        example_tokens(made, (made.eos_token_id,), "Capital?", "Paris", "pairs")


def test_an_answer_that_nothing_ends_is_refused():
    made = tokenizer(PLAIN)
    made.eos_token = None
    with pytest.raises(ConfigError, match="writes no token behind an answer"):
        example_tokens(made, (5,), "Capital?", "Paris", "line 1")


def test_a_template_that_writes_the_date_writes_the_same_one_every_day():
    """Else a run that goes on tomorrow would go on with other prompts."""
    made = tokenizer(DATED)
    assert made.decode(question_tokens(made, "Capital?")) == "26 Jul 2024Capital?<|im_end|>"


def test_an_answer_that_is_dropped_ends_no_turn():
    """What stands behind the question is not what ends an answer."""
    assert turn_end(tokenizer(DROPPED)) is None
