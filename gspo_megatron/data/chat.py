"""What a chat template writes: prompts as rollouts see them, and the responses that the template makes of answers.

A supervised response is what the template of [user, assistant] writes behind the prompt, up to the token that ends a
rollout: with the think block, the channel or the end-of-turn token that the model was made with. Where the template
ends no turn (GLM-4.5), the response ends with the token that begins the next one, if rollouts stop there, else with
the tokenizer's end-of-text token.

Left out: tools, and responses of several turns.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, tzinfo
from os.path import commonprefix
from typing import Any, cast

from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from gspo_megatron.batch import Message
from gspo_megatron.config.constraints import require
from gspo_megatron.data.limits import limited
from gspo_megatron.errors import RolloutError

LONGEST = 1 << 24  # characters of a rendered conversation
Question = str | Sequence[Message]
PROBE, ANSWER = "gspoprobe", "gspoanswer"  # a question and an answer that no template changes


def question_tokens(
    tokenizer: PreTrainedTokenizerBase, question: Question, options: dict[str, Any] | None = None
) -> list[int]:
    """Return token ids of a question, or of a conversation, through the chat template, up to where the response begins.

    Args:
        options: further arguments of the template, as enable_thinking.
    """
    return encode(tokenizer, render(tokenizer, _messages(question), **(options or {}), add_generation_prompt=True))


def example_tokens(
    tokenizer: PreTrainedTokenizerBase,
    stop_token_ids: tuple[int, ...],
    question: Question,
    answer: str,
    where: str,
    options: dict[str, Any] | None = None,
) -> tuple[list[int], list[int]]:
    """Return token ids of a question up to where the response begins, and of the response that an answer is.

    Args:
        stop_token_ids: that end a rollout; the first of them ends the response.
        where: the answer's task, or file and line, for messages.
        options: further arguments of the template.

    Raises:
        ConfigError: the template's [user, assistant] does not begin with the prompt, or nothing ends a response.
        RolloutError: the answer has a stop token before its end, or the template refuses it.
    """
    messages, options = _messages(question), options or {}
    prompt = render(tokenizer, messages, **options, add_generation_prompt=True)
    whole = render(tokenizer, [*messages, _assistant(answer)], **options)
    _check_prefix(prompt, whole, where)
    if answer.strip() not in whole[len(prompt) :]:
        _check_answers(tokenizer, where)
    prompt_ids, whole_ids = encode(tokenizer, prompt), encode(tokenizer, whole)
    if whole_ids[: len(prompt_ids)] == prompt_ids:
        response = whole_ids[len(prompt_ids) :]
    else:  # a token reaches over the border, which no rollout could sample
        response = encode(tokenizer, whole[len(prompt) :])
    end = next((place for place, token in enumerate(response) if token in stop_token_ids), None)
    if end is None:
        return prompt_ids, [*response, _missing_end(tokenizer, stop_token_ids)]
    _check_inner_stop(tokenizer, response, end, answer, where)
    return prompt_ids, response[: end + 1]


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the special token that the template writes behind an answer, or None where it writes none."""
    try:
        whole = render(tokenizer, [_user(PROBE), _assistant(ANSWER)])
    except RolloutError:
        return None
    behind = encode(tokenizer, whole.rpartition(ANSWER)[2].lstrip()) if ANSWER in whole else []
    return behind[0] if behind and _is_special(tokenizer, behind[0]) else None


def _missing_end(tokenizer: PreTrainedTokenizerBase, stop_token_ids: tuple[int, ...]) -> int:
    """Return what ends a turn that the template leaves open: where the next one begins, if that is a stop token."""
    turns = [_user(PROBE), _assistant(PROBE)]
    try:
        following = render(tokenizer, [*turns, _user(PROBE)]).removeprefix(render(tokenizer, turns))
    except RolloutError:
        following = ""
    behind = encode(tokenizer, following.lstrip())
    if behind and behind[0] in stop_token_ids:
        return behind[0]
    require(
        tokenizer.eos_token_id is not None,
        "tokenizer.chat_template",
        str(tokenizer.chat_template)[:60],  # several are a dict
        "writes no token behind an answer that ends a rollout, and the tokenizer has no eos_token",
        "Set eos_token in tokenizer_config.json.",
    )
    return cast(int, tokenizer.eos_token_id)


def _check_prefix(prompt: str, whole: str, where: str) -> None:
    same = len(commonprefix([prompt, whole]))
    require(
        whole.startswith(prompt),
        "tokenizer.chat_template",
        whole[max(same - 20, 0) : same + 40],
        "what it makes of question and answer does not begin with the prompt of a rollout, which goes on with "
        f"{prompt[same : same + 40]!r} there ({where}), so no response can be cut out of it",
        "Use a template whose prompt (add_generation_prompt) the answer follows, or set warm_start.steps = 0.",
    )
    require(
        whole != prompt,
        "tokenizer.chat_template",
        whole[-60:],
        f"writes nothing for an answer ({where})",
        "Use a template that knows the role assistant.",
    )


def _check_answers(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Refuse a template that writes answers otherwise than they are, or not at all. (One that leaves out a part of
    some, as the thought before an answer, is none.)"""
    whole = render(tokenizer, [_user(PROBE), _assistant(ANSWER)])
    require(
        ANSWER in whole.partition(PROBE)[2],
        "tokenizer.chat_template",
        whole[-60:],
        f"does not write the answer {ANSWER!r} as it is ({where}), so another one would be learned",
        "Use a template that writes what the assistant says, or set warm_start.steps = 0.",
    )


def _check_inner_stop(
    tokenizer: PreTrainedTokenizerBase, response: list[int], end: int, answer: str, where: str
) -> None:
    """Refuse an answer that goes on behind a stop token. What the template itself writes there is left out."""
    stop = cast(str, tokenizer.decode([response[end]], skip_special_tokens=False))
    before = answer.rstrip()
    while stop and before.endswith(stop):
        before = before.removesuffix(stop).rstrip()
    if stop and stop in before:
        raise RolloutError(
            f"{where}: the answer has {stop!r} before its end, where a rollout stops. Remove it from the answer, or "
            "the answer."
        )


def _is_special(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    return token in tokenizer.all_special_ids or token in tokenizer.added_tokens_decoder


def _messages(question: Question) -> list[Message]:
    return [_user(question)] if isinstance(question, str) else list(question)


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], **options: Any) -> str:
    """Apply the template. Raises RolloutError for what it refuses, and where it has no end."""
    try:
        with limited(), _on_one_day():
            text = cast(str, tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception as error:  # a template is a program that came with the model
        reason = f"ends it with {type(error).__name__}: {error!s:.300}"
    else:
        if len(text) <= LONGEST:
            return text
        reason = f"makes it write {len(text)} characters"
    roles = ", ".join(message["role"] for message in messages)
    raise RolloutError(
        f"tokenizer.chat_template: a conversation of {roles} {reason}. Use the instruction-tuned model's."
    )


class _OneDay(datetime):
    """Some templates write today's date. Prompts that change at midnight could not be repeated, and a resumed run would
    go on with others; this is the date that Llama 3's templates take where there is no clock."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> "_OneDay":
        return cls(2024, 7, 26, tzinfo=tz)


@contextmanager
def _on_one_day() -> Iterator[None]:
    """It is that day for templates. (transformers gives them its own strftime_now, and takes no other.)"""
    kept = chat_template_utils.datetime
    chat_template_utils.datetime = _OneDay  # type: ignore[misc]
    try:
        yield
    finally:
        chat_template_utils.datetime = kept  # type: ignore[misc]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # The template has written the special tokens, so the tokenizer must not add its own.
    return tokenizer.encode(text, add_special_tokens=False)
