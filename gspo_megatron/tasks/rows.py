"""What a row of data asks, and its gold answer where it has one; columns are those of TRL's and verl's data sets.

A gold answer may be an episode of several turns: messages of the assistant, and what others say between them. The warm
start learns from it; scorers get one of the usual columns as the answer then, or the last message. Left out:
messages with anything but text (calls of tools are written in the content), and answers of other types.
"""

import difflib
import math
from collections.abc import Iterator
from typing import Any

from gspo_megatron.batch import Message, TaskItem
from gspo_megatron.config import AnswerConfig, TaskConfig
from gspo_megatron.tasks.data_files import BadRow, shortened

ROLES = ("system", "user", "assistant", "tool")
ANSWERS = ("solution", "answer", "ground_truth")  # where verl's reward_model.ground_truth is not given
PROMPT_FORM = 'Write a text, or messages: [{"role": "user", "content": ...}].'
REPAIR = "Repair or remove the row."


def item_of(columns: dict[str, Any], name: str, config: TaskConfig) -> TaskItem:
    """Return the item of task `name` that a row is; all its columns are the item's entry.

    Raises:
        BadRow: it has no prompt, or not the answer that the recipe says it has.
    """
    question, messages = prompt_of(_column(columns, config.prompt_key, f"tasks.{name}.prompt_key"), config.prompt_key)
    if episode := _episode(columns, config.answer, name):
        usual = _answer(columns, AnswerConfig(), name) or episode[-1]["content"]
        return TaskItem(name, question, usual, columns, messages=messages, episode=episode)
    answer = _answer(columns, config.answer, name)
    return TaskItem(name, question, answer or "", columns, has_answer=answer is not None, messages=messages)


def prompt_of(value: Any, key: str) -> tuple[str, tuple[Message, ...]]:
    """Return what is asked as a text, and as messages where `value` is a list of them.

    Args:
        key: the column's name, for messages.

    Raises:
        BadRow: it is neither a text nor a list of messages, or asks nothing.
    """
    if isinstance(value, str):
        return _text(value, key), ()
    if not isinstance(value, list) or not value:
        raise BadRow(f"{key} = {shortened(value)} must be a text or a list of messages", PROMPT_FORM)
    messages = tuple(_message(message, f"{key}[{place}]") for place, message in enumerate(value))
    if messages[-1]["role"] == "assistant":
        raise BadRow(
            f"{key} ends with a message of the assistant, which is what the model is to write",
            "End with a message of the user, and put the answer in a column of its own.",
        )
    return "\n\n".join(message["content"] for message in messages), messages


def _message(message: Any, where: str, may_have: tuple[str, ...] = ()) -> Message:
    """A message with role, content, and the fields that it may have besides."""
    if not isinstance(message, dict):
        raise BadRow(f"{where} = {shortened(message)} must be a message with role and content", PROMPT_FORM)
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise BadRow(f"{where}.role = {shortened(role)} must be one of {', '.join(ROLES)}", PROMPT_FORM)
    if not isinstance(content, str):
        raise BadRow(
            f"{where}.content = {shortened(content)} must be text, and this project takes text alone",
            "Write the content as one text, without images and parts.",
        )
    # Parquet gives every message all the fields that one of them has.
    filled = {field: value for field, value in message.items() if value is not None}
    if others := sorted(filled.keys() - {"role", "content", *may_have}):
        raise BadRow(
            f"{where} has {', '.join(others)}, which the model would not get to see",
            "Leave role and content alone in messages.",
        )
    more = {field: _text(str(filled[field]), f"{where}.{field}") for field in may_have if field in filled}
    return {"role": role, "content": _text(content, f"{where}.content"), **more}


def _text(text: str, where: str) -> str:
    if not text.strip():
        raise BadRow(f"{where} = {text!r} is empty", "Remove it.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow(
            f"{where} = {shortened(text)} has half of a surrogate pair, which no tokenizer can read", REPAIR
        ) from None
    return text


def _answer(columns: dict[str, Any], config: AnswerConfig, name: str) -> str | None:
    """The gold answer; None where a row needs none and has none."""
    if config.column is None:
        where = "answer"
        found = (text for text in map(_written, _usual_answers(columns)) if text)
        text = next(found, "")
    else:
        where = config.column
        value = _column(columns, where, f"tasks.{name}.answer.column")
        text = _written(value)
        if not text:
            raise BadRow(
                f"{where} = {shortened(value)} must be a text or a number, the answer, or an episode's messages", REPAIR
            )
    if config.after is not None:
        whole = text
        text = whole.rpartition(config.after)[2].strip() if config.after in whole else ""
        if not text:
            raise BadRow(
                f"{where} = {shortened(whole)} has no answer after {config.after!r}",
                f"Repair the row, or correct tasks.{name}.answer.",
            )
    return _text(text, where) if text else None


def _episode(columns: dict[str, Any], config: AnswerConfig, name: str) -> tuple[Message, ...]:
    """The gold answer where it is a list of messages, () where it is none."""
    if config.column is None:
        return ()
    where, value = config.column, _column(columns, config.column, f"tasks.{name}.answer.column")
    if not isinstance(value, list) or not any(isinstance(one, dict) for one in value):
        return ()
    if config.after is not None:
        raise BadRow(f"{where} has messages, in which no answer is looked for", f"Remove tasks.{name}.answer.after.")
    episode = tuple(_message(one, f"{where}[{place}]", ("name",)) for place, one in enumerate(value))
    roles = [message["role"] for message in episode]
    if roles[0] != "assistant" or roles[-1] != "assistant":
        raise BadRow(f"{where} must begin and end with a message of the assistant, and has the roles {roles}", REPAIR)
    if "system" in roles or ("assistant", "assistant") in zip(roles, roles[1:], strict=False):
        raise BadRow(
            f"{where} must have something that a user or tool says between two messages of the assistant, and has the "
            f"roles {roles}",
            REPAIR,
        )
    return episode


def _usual_answers(columns: dict[str, Any]) -> Iterator[Any]:
    judged = columns.get("reward_model")  # verl's
    if isinstance(judged, dict):
        yield judged.get("ground_truth")
    yield from map(columns.get, ANSWERS)


def _written(value: Any) -> str:
    """A text or number as text, "" for anything else."""
    if isinstance(value, float) and not math.isfinite(value):  # pandas' word for a missing value
        return ""
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value) if str(value).strip() else ""
    return ""


def _column(columns: dict[str, Any], key: str, setting: str) -> Any:
    if key not in columns:
        close = difflib.get_close_matches(key, columns, n=1)
        hint = f"Did you mean {close[0]}? " if close else ""
        there = f"only {', '.join(columns)}" if columns else "it is empty"
        raise BadRow(f"has no column {key}, {there}", f"{hint}Give {setting}.")
    return columns[key]
