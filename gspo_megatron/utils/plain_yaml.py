"""YAML from files of others is read within limits: size, nesting, and how much its aliases (`*name`) stand for.

PyYAML's safe loader makes no objects, but its scanner takes many seconds for a megabyte, and nine lines of aliases can
stand for a billion values.
"""

from collections.abc import Iterator
from itertools import accumulate
from typing import IO, Any

import yaml

LARGEST = 1 << 18  # characters of a file; a recipe has some thousands
OPEN = 500  # brackets in each other: the scanner's time grows with their square
VALUES = 1 << 17  # that all lines together stand for
NOT_A_VALUE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError)


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader within these limits. Raises yaml.YAMLError alone."""

    def __init__(self, stream: str | IO[str]):
        text = stream if isinstance(stream, str) else stream.read(LARGEST + 1)
        if len(text) > LARGEST:
            raise yaml.YAMLError(f"over {LARGEST >> 10} kB, which is more than is read")
        steps = (1 if mark in "[{" else -1 for mark in text if mark in "[]{}")
        if max(accumulate(steps), default=0) > OPEN:
            raise yaml.YAMLError("nested too deep")
        super().__init__(text)

    def get_single_data(self) -> Any:
        try:
            return super().get_single_data()
        except RecursionError:
            raise yaml.YAMLError("nested too deep") from None
        except NOT_A_VALUE as error:  # what PyYAML raises of values that do not fit their tag, for example a month 13
            raise yaml.YAMLError(f"a value cannot be read ({error!s:.200})") from None

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _count(node, {})
        return node


def _count(node: yaml.Node, known: dict[int, int | None]) -> int:
    """How many values a node stands for, each alias as often as it is written."""
    if id(node) not in known:
        known[id(node)] = None  # until it is known; who asks before is inside of it
        known[id(node)] = 1 + sum(_count(inner, known) for inner in _inside(node))
    found = known[id(node)]
    if found is None:
        raise yaml.YAMLError("an alias stands inside of what it names")
    if found > VALUES:
        raise yaml.YAMLError(f"it stands for over {VALUES} values")
    return found


def _inside(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        yield from node.value
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from (key, value)
