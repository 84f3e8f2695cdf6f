"""Names and paths of a recipe, and words of a batch script, are refused unless a positive rule lets them through.

Left out: whether a file is there, or may be written; those who use it look.
"""

import re
from pathlib import Path

from gspo_megatron.config.constraints import require

LONGEST_NAME = 100
LONGEST_PART, LONGEST_PATH = 255, 4095  # bytes: Linux' NAME_MAX, and PATH_MAX without its 0
RUN_NAME = re.compile(r"(?!.*\.\.)[A-Za-z0-9_][A-Za-z0-9._-]*")


def check_run_name(field: str, name: str, longest: int = LONGEST_NAME) -> None:
    """Raise ConfigError for what cannot be a folder, a job's name and a word of a script at once."""
    require(
        len(name) <= longest and RUN_NAME.fullmatch(name) is not None,
        field,
        _shortened(name),
        f"must be at most {longest} letters (a-z), digits, '.', '_' and '-', begin with a letter, digit or '_', and "
        "have no '..'",
        "Give a name such as moe_gspo-2, and output_dir for the folder in which it is made.",
    )


def check_path(field: str, path: Path | None) -> None:
    """Raise ConfigError for a path that no file can have, or that holds control characters."""
    text = "" if path is None else str(path)
    require(
        text.isprintable(),
        field,
        _shortened(text),
        "has a character that cannot be printed",
        "Write the path without control characters.",
    )
    check_length(field, Path(text))


def check_length(field: str, path: Path) -> None:
    """Raise ConfigError for a path that is longer than any file's, or has a name in it that is."""
    text = str(path)
    size = max((len(part.encode(errors="surrogateescape")) for part in text.split("/")), default=0)
    require(
        size <= LONGEST_PART and len(text.encode(errors="surrogateescape")) <= LONGEST_PATH,
        field,
        _shortened(text),
        f"is too long: a path has at most {LONGEST_PATH} bytes, and each name in it {LONGEST_PART}",
        "Give a shorter path.",
    )


def check_word(field: str, word: str, rule: str, remedy: str) -> None:
    """Raise ConfigError for a word that a regular expression does not match as a whole, ASCII alone."""
    require(
        len(word) <= LONGEST_PATH and re.fullmatch(rule, word, re.ASCII) is not None,
        field,
        _shortened(word),
        "has characters that cannot be written into a batch script",
        remedy,
    )


def _shortened(text: str) -> str:
    """A value as a message shows it: a line, not a page."""
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"
