"""The stream of prompts: what is in it, where it stops, how it goes on."""

import time

import pytest

from gspo_megatron.config import TaskConfig
from gspo_megatron.data.prompts import PromptSource
from gspo_megatron.data.tokenizer import train_tokenizer
from gspo_megatron.errors import CheckpointError, ConfigError, RolloutError
from gspo_megatron.tasks.mixture import TaskMixture
from gspo_megatron.tasks.splits import split_of


@pytest.fixture(scope="module")
def mixture():
    return TaskMixture({"spell_backward": TaskConfig(), "gcd": TaskConfig()}, seed=1)


@pytest.fixture(scope="module")
def tokenizer(mixture):
    return train_tokenizer([mixture.item("train", i).question for i in range(500)], vocab_size=320)


def source(mixture, tokenizer, split="train", limit=40):
    return PromptSource(mixture, tokenizer, split, max_prompt_length=limit)


def test_a_prompt_is_the_question_through_the_chat_template(mixture, tokenizer):
    for prompt in source(mixture, tokenizer).next(8):
        assert tokenizer.decode(prompt.token_ids) == f"<|user|>{prompt.item.question}<|assistant|>"
        assert prompt.item == mixture.item("train", prompt.uid)


def test_the_stream_goes_on_and_never_repeats_a_position(mixture, tokenizer):
    stream = source(mixture, tokenizer)
    assert [prompt.uid for prompt in stream.next(3) + stream.next(2)] == [0, 1, 2, 3, 4]


def test_a_saved_stream_resumes_with_the_next_prompt(mixture, tokenizer):
    whole, first, second = (source(mixture, tokenizer) for _ in range(3))
    expected = whole.next(7)
    first.next(4)
    assert first.state_dict() == {"position": 4}
    second.load_state_dict(first.state_dict())
    assert second.next(3) == expected[4:]


@pytest.mark.parametrize("state", [{}, {"position": -1}, {"position": "4"}])
def test_a_state_of_another_kind_is_refused(mixture, tokenizer, state):
    with pytest.raises(CheckpointError, match="prompt stream: position"):
        source(mixture, tokenizer).load_state_dict(state)


def test_fixed_prompts_do_not_move_the_stream(mixture, tokenizer):
    stream = source(mixture, tokenizer, "eval")
    held_out = stream.fixed(4)
    assert stream.position == 0 and stream.next(4) == held_out == stream.fixed(4)
    assert {split_of(prompt.item.question) for prompt in held_out} == {"eval"}


def test_the_answer_ends_with_end_of_text(mixture, tokenizer):
    stream = source(mixture, tokenizer)
    item = stream.next(1)[0].item
    example = stream.encode_example(item, (tokenizer.eos_token_id,))
    ids = example.token_ids[example.prompt_length :]
    assert tokenizer.decode(ids[:-1]) == item.answer and ids[-1] == tokenizer.eos_token_id
    assert example.token_ids[: example.prompt_length] == stream.encode_prompt(item)
    # The supervised example is what the chat template makes of the whole conversation.
    turns = [{"role": "user", "content": item.question}, {"role": "assistant", "content": item.answer}]
    assert example.token_ids == tokenizer.encode(tokenizer.apply_chat_template(turns, tokenize=False))


def test_a_task_without_gold_answers_cannot_be_learned_from(tokenizer):
    rush_hour = TaskMixture({"rush_hour": TaskConfig()}, seed=1)
    with pytest.raises(RolloutError, match=r"tasks\.rush_hour.*no gold answer.*warm_start\.steps = 0"):
        source(rush_hour, tokenizer).encode_example(rush_hour.item("warm_start", 0), ())


def test_a_long_prompt_names_task_lengths_and_field_and_the_stream_stays(mixture, tokenizer):
    length = len(source(mixture, tokenizer).next(1)[0].token_ids)
    assert len(source(mixture, tokenizer, limit=length).next(1)) == 1
    stream = source(mixture, tokenizer, limit=length - 1)
    told = rf"data\.max_prompt_length = {length - 1}: a prompt of tasks\.\w+ has {length} tokens.*at least {length}"
    with pytest.raises(RolloutError, match=told):
        stream.next(1)
    assert stream.position == 0


def test_a_tokenizer_without_a_chat_template_is_refused(mixture, tokenizer):
    plain = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    with pytest.raises(ConfigError, match=r"tokenizer\.chat_template = None"):
        source(mixture, plain)


def test_drawing_prompts_is_fast(mixture, tokenizer):
    stream = source(mixture, tokenizer)
    stream.next(8)
    start = time.perf_counter()
    stream.next(256)
    assert time.perf_counter() - start < 3.0  # measured 0.05 s; a dataset that is built per prompt takes 10 s
