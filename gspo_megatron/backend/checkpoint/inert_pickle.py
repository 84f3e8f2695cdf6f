"""Reads a pickle as data: what it names is noted and never imported, called or given attributes.

A pickle is a program for a small stack machine, and Python's own machine calls whatever the program names; an allowed
list does not help where an allowed type can be told to call. The machine here knows the thirty instructions that
records, tensors and their indices are written with, and its only values are numbers, text, None, tuples, lists and the
records below. It has no instruction that runs anything.

Left out: bytes, sets, floats, text of over 4 GiB, and everything of protocol 0.
"""

import pickle
import struct
from collections.abc import Callable, Collection
from dataclasses import dataclass

DEPTH = 10_000  # of the stack: Python writes a dictionary's entries by the thousand
WIDEST = 8  # bytes of an integer
LONGEST_NAME = 200


class Malformed(ValueError):
    """Raised for bytes that are no pickle, or none that is written here."""


class Refused(ValueError):
    """Raised for a pickle that names what has no place in it."""


@dataclass(frozen=True, slots=True)
class Named:
    """A class, a function or a constant, by name alone."""

    module: str
    name: str


@dataclass(slots=True, eq=False)
class Made:
    """What a pickle wants made: the call that would make it, and the state that would be given to it."""

    kind: Named
    arguments: tuple
    state: object = None


class Pairs(list):
    """The entries of a dictionary, in their order. Nothing is hashed or compared."""


@dataclass(frozen=True, slots=True)
class Persistent:
    """What the reader is to look up elsewhere, for example a tensor's memory."""

    key: object


def read(data: bytes, names: Collection[Named], steps: int) -> object:
    """Return what a pickle describes.

    Args:
        names: what it may name.
        steps: it may have so many instructions.

    Raises:
        Malformed: it is cut short, too long, or has an instruction that is not known here.
        Refused: it names something else.
    """
    machine = _Machine(data, names)
    try:
        for _ in range(steps):
            code = data[machine.at]
            machine.at += 1
            if code == STOP:
                return machine.pop()
            INSTRUCTIONS[code](machine)
            if len(machine.stack) > DEPTH or len(machine.marks) > DEPTH:
                raise Malformed(f"over {DEPTH} values wait on its stack")
    except KeyError:
        raise Malformed(f"instruction {data[machine.at - 1]:#04x} at byte {machine.at - 1}") from None
    except (IndexError, struct.error, UnicodeDecodeError) as error:
        raise Malformed(f"at byte {machine.at}: {type(error).__name__}") from None
    raise Malformed(f"over {steps} instructions")


class _Machine:
    """Where the reading is: a place in the bytes, the values that wait, and those that may be wanted again."""

    def __init__(self, data: bytes, names: Collection[Named]):
        self.data, self.names, self.at = data, frozenset(names), 0
        self.stack: list = []
        self.marks: list[int] = []
        self.memo: dict[int, object] = {}

    def pop(self) -> object:
        if self.marks and len(self.stack) <= self.marks[-1]:
            raise Malformed("a mark stands where a value is wanted")
        return self.stack.pop()

    def since_mark(self) -> list:
        first = self.marks.pop()
        values = self.stack[first:]
        del self.stack[first:]
        return values

    def number(self, form: struct.Struct) -> int:
        (value,) = form.unpack_from(self.data, self.at)
        self.at += form.size
        return value

    def text(self, length: int) -> str:
        end = self.at + length
        if end > len(self.data):
            raise Malformed("it ends within a text")
        self.at, start = end, self.at
        return self.data[start:end].decode()

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + LONGEST_NAME)
        if end < 0:
            raise Malformed("a name without an end")
        text = self.text(end - self.at)
        self.at = end + 1
        return text

    def name(self, module: object, name: object) -> None:
        if type(module) is not str or type(name) is not str:
            raise Malformed("a name is no text")
        if Named(module, name) not in self.names:
            raise Refused(f"it names {module[:100]}.{name[:100]}")
        self.stack.append(Named(module, name))

    def make(self) -> None:
        arguments, kind = self.pop(), self.pop()
        if type(kind) is not Named or type(arguments) is not tuple:
            raise Refused("it calls what it has not named")
        self.stack.append(Made(kind, arguments))

    def build(self) -> None:
        state, made = self.pop(), self.stack[-1]
        if type(made) is not Made or made.state is not None:
            raise Refused(f"it gives a state to a {type(made).__name__}")
        made.state = state

    def extend(self, values: list) -> None:
        if type(self.stack[-1]) is not list:
            raise Refused(f"it appends to a {type(self.stack[-1]).__name__}")
        self.stack[-1].extend(values)

    def fill(self, values: list) -> None:
        if type(self.stack[-1]) is not Pairs or len(values) % 2:
            raise Refused(f"it sets entries of a {type(self.stack[-1]).__name__}")
        self.stack[-1].extend(zip(values[::2], values[1::2], strict=True))

    def tuple_of(self, count: int) -> None:
        values = [self.pop() for _ in range(count)]
        self.stack.append(tuple(values[::-1]))

    def keep(self, place: int) -> None:
        self.memo[place] = self.stack[-1]

    def integer(self) -> None:
        length = self.number(BYTE)
        if length > WIDEST:
            raise Malformed(f"a number of {length} bytes")
        value = self.data[self.at : self.at + length]
        self.at += length
        self.stack.append(int.from_bytes(value, "little", signed=True))


BYTE, SHORT, WORD, SIGNED = struct.Struct("<B"), struct.Struct("<H"), struct.Struct("<I"), struct.Struct("<i")
STOP = pickle.STOP[0]


def _named_by_stack(m: _Machine) -> None:
    name, module = m.pop(), m.pop()
    m.name(module, name)


def _entry(m: _Machine) -> None:
    value, key = m.pop(), m.pop()
    m.fill([key, value])


def _skip(count: int) -> Callable[[_Machine], None]:
    def skip(m: _Machine) -> None:
        m.at += count

    return skip


INSTRUCTIONS: dict[int, Callable[[_Machine], None]] = {
    code[0]: instruction
    for code, instruction in {
        pickle.PROTO: _skip(1),
        pickle.FRAME: _skip(8),  # contents stand in the file as they are
        pickle.MARK: lambda m: m.marks.append(len(m.stack)),
        pickle.NONE: lambda m: m.stack.append(None),
        pickle.NEWTRUE: lambda m: m.stack.append(True),
        pickle.NEWFALSE: lambda m: m.stack.append(False),
        pickle.BININT: lambda m: m.stack.append(m.number(SIGNED)),
        pickle.BININT1: lambda m: m.stack.append(m.number(BYTE)),
        pickle.BININT2: lambda m: m.stack.append(m.number(SHORT)),
        pickle.LONG1: _Machine.integer,
        pickle.SHORT_BINUNICODE: lambda m: m.stack.append(m.text(m.number(BYTE))),
        pickle.BINUNICODE: lambda m: m.stack.append(m.text(m.number(WORD))),
        pickle.EMPTY_TUPLE: lambda m: m.stack.append(()),
        pickle.EMPTY_LIST: lambda m: m.stack.append([]),
        pickle.EMPTY_DICT: lambda m: m.stack.append(Pairs()),
        pickle.TUPLE: lambda m: m.stack.append(tuple(m.since_mark())),
        pickle.TUPLE1: lambda m: m.tuple_of(1),
        pickle.TUPLE2: lambda m: m.tuple_of(2),
        pickle.TUPLE3: lambda m: m.tuple_of(3),
        pickle.APPEND: lambda m: m.extend([m.pop()]),
        pickle.APPENDS: lambda m: m.extend(m.since_mark()),
        pickle.SETITEM: _entry,
        pickle.SETITEMS: lambda m: m.fill(m.since_mark()),
        pickle.MEMOIZE: lambda m: m.keep(len(m.memo)),
        pickle.BINPUT: lambda m: m.keep(m.number(BYTE)),
        pickle.LONG_BINPUT: lambda m: m.keep(m.number(WORD)),
        pickle.BINGET: lambda m: m.stack.append(_kept(m, m.number(BYTE))),
        pickle.LONG_BINGET: lambda m: m.stack.append(_kept(m, m.number(WORD))),
        pickle.GLOBAL: lambda m: m.name(m.line(), m.line()),
        pickle.STACK_GLOBAL: _named_by_stack,
        pickle.REDUCE: _Machine.make,
        pickle.NEWOBJ: _Machine.make,
        pickle.BUILD: _Machine.build,
        pickle.BINPERSID: lambda m: m.stack.append(Persistent(m.pop())),
    }.items()
}


def _kept(m: _Machine, place: int) -> object:
    if place not in m.memo:
        raise Malformed(f"value {place} is wanted and was not kept")
    return m.memo[place]
