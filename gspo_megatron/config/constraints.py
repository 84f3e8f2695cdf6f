"""A recipe's dataclasses refuse a bad value by one form of message, and allow no unknown fields."""

from pydantic import ConfigDict

from gspo_megatron.errors import ConfigError

STRICT = ConfigDict(extra="forbid")


def require(ok: bool, field_name: str, value: object, constraint: str, remedy: str) -> None:
    """Raise the one form of message that every bad value gets."""
    if not ok:
        raise ConfigError(f"{field_name} = {value!r}: {constraint}. {remedy}")


def positive(prefix: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{prefix}.{name}", value, "must be greater than 0", "Give a positive number.")
