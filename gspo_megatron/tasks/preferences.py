"""Preference pairs from JSONL: read and judged before anything heavy starts, so nothing here imports torch.

One object a line, {"prompt": ..., "chosen": ..., "rejected": ...}, all plain text: the chat template and the
end-of-text token are added when the pairs are tokenized (preferences.py in the package). Other keys are ignored, and so
are empty lines.

Left out: conversations of several turns, columns of other names, several files, and any search for duplicates: where
neighbouring lines share a prompt, give held-out pairs a file of their own.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gspo_megatron.config import PreferenceConfig
from gspo_megatron.config.constraints import require
from gspo_megatron.utils import plain_json

FIELDS = ("prompt", "chosen", "rejected")
HELD_OUT_SHARE = 10  # one in so many of the pairs of `path`, where the recipe gives no eval_path
LINE = 1 << 22  # bytes of a line; the longest context has some millions of characters
FORM = 'Write one {"prompt": ..., "chosen": ..., "rejected": ...} a line.'


@dataclass(frozen=True)
class PreferencePair:
    """A question with a better and a worse answer."""

    prompt: str
    chosen: str
    rejected: str
    where: str = field(default="", compare=False)  # file and line, for messages


@dataclass(frozen=True)
class PreferenceData:
    """Some pairs are trained on, and the held-out ones never are."""

    train: list[PreferencePair]
    held_out: list[PreferencePair]


def load_pairs(config: PreferenceConfig) -> PreferenceData:
    """Load the training and held-out pairs of a recipe.

    Without eval_path the last tenth of `path` is held out, at least one pair.

    Raises:
        ConfigError: no path, a file or line that cannot be used, or fewer training pairs than a batch has.
    """
    name = "algorithm.preference.path"
    require(
        config.path is not None,
        name,
        None,
        "dpo learns from preference pairs",
        "Give a JSONL file; examples/make_preferences.py writes one from a recipe's tasks.",
    )
    assert config.path is not None  # as just required
    pairs = read_pairs(config.path, name)
    if config.eval_path is None:
        cut = len(pairs) - max(1, len(pairs) // HELD_OUT_SHARE)
        data = PreferenceData(pairs[:cut], pairs[cut:])
        held = f" after the last {len(data.held_out)} are held out"
    else:
        data = PreferenceData(pairs, read_pairs(config.eval_path, "algorithm.preference.eval_path"))
        held = ""
    size = config.batch_size
    require(
        len(data.train) >= size,
        "algorithm.preference.batch_size",
        size,
        f"{config.path} leaves {len(data.train)} pairs to train on{held}, fewer than a batch",
        f"Give more pairs, or a batch_size of {max(len(data.train), 1)} or less.",
    )
    return data


def read_pairs(path: Path, setting: str) -> list[PreferencePair]:
    """Read every pair of a file, in its order.

    Args:
        setting: the recipe's name for the path, for messages.

    Raises:
        ConfigError: with file, line and what is wrong.
    """
    pairs = []
    try:
        with path.open("rb") as file:
            # Of a line that is too long no more is held than shows that.
            for number, line in enumerate(iter(lambda: file.readline(LINE + 1), b""), 1):
                if line.strip():
                    pairs.append(_pair(line, setting, f"{path}, line {number}"))
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        require(
            False,
            setting,
            str(path),
            reason,
            "Give the path of a JSONL file; a relative one is looked up from "
            "the current directory, the recipe's folder and the repository.",
        )
    require(len(pairs) > 0, setting, str(path), "holds no pair", FORM)
    return pairs


def _pair(line: bytes, setting: str, where: str) -> PreferencePair:
    try:
        record = plain_json.parse(line, LINE)
    except ValueError as error:
        require(False, setting, where, f"not valid JSON ({error})", FORM)
    require(isinstance(record, dict), setting, where, f"holds {_short(record)}, must be a JSON object", FORM)
    for name in FIELDS:
        require(name in record, setting, where, f"{name} is missing", FORM)
        value = record[name]
        require(
            isinstance(value, str),
            setting,
            where,
            f"{name} = {_short(value)} must be text",
            "Write conversations out as one text.",
        )
        require(
            value.strip() != "",
            setting,
            where,
            f"{name} = {value!r} is empty",
            "Remove the line: an empty answer teaches only to stop.",
        )
        require(
            _is_unicode(value),
            setting,
            where,
            f"{name} = {_short(value)} has half of a surrogate pair, which no tokenizer can read",
            "Repair or remove the line.",
        )
    same = record["chosen"] == record["rejected"]
    require(
        not same,
        setting,
        where,
        f"chosen and rejected are both {_short(record['chosen'])}",
        "Remove the line: it prefers nothing.",
    )
    return PreferencePair(record["prompt"], record["chosen"], record["rejected"], where)


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
