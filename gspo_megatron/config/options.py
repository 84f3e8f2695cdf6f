"""Options of the commands are refused by the names of their command line, as a recipe's fields are."""

import dataclasses
from pathlib import Path
from typing import Any

from gspo_megatron.config.constraints import check_field
from gspo_megatron.config.names import check_length


def check_options(options: Any, **words: str) -> None:
    """Raise ConfigError for numbers and texts that mean nothing (constraints.check_numbers), and for paths that no file
    can have.

    Args:
        words: what the command calls its positional ones, by field.
    """
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        name = words.get(field.name, "--" + field.name.replace("_", "-"))
        check_field(value, name)
        for path in value if isinstance(value, list | tuple) else [value]:
            if isinstance(path, Path):
                check_length(name, path)
