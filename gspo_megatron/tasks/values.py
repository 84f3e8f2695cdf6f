"""What evaluated text has as its value, as plain data (JSON) that crosses from a process that nobody trusts.

Numbers, strings, truth values, None, and lists of them are themselves; what else can be iterated over is a list. A
sympy expression is {"call": [name, its arguments]}, of numbers, symbols, constants and sympy's functions, and is built
again from the classes of those names alone. Left out: everything else, such as relations, matrices, integrals that are
not worked out and functions without a name in sympy: they have no value here, and so earn what a scorer gives to text
that it cannot read.
"""

from collections.abc import Iterable
from typing import Any

import sympy

ATOMS = (str, int, float, bool, type(None))
CONSTANTS = {
    name: getattr(sympy, name)
    for name in ("pi", "E", "I", "oo", "zoo", "nan", "EulerGamma", "GoldenRatio", "Catalan", "TribonacciConstant")
} | {"-oo": -sympy.oo}
FUNCTIONS = {name: value for name, value in vars(sympy).items() if isinstance(value, sympy.FunctionClass)} | {
    kind.__name__: kind for kind in (sympy.Add, sympy.Mul, sympy.Pow)
}
LONGEST = 100_000  # items of a list: what is iterated over may never end


def to_data(value: Any) -> Any:
    """Return a value as data. Raises TypeError for one that has no such form, ValueError for an endless one."""
    if type(value) in ATOMS:
        return value
    if isinstance(value, sympy.Basic):
        return _expression(value)
    if not isinstance(value, Iterable):
        raise TypeError(f"a value of type {type(value).__name__} cannot be handed out of the evaluation")
    items = []
    for item in value:
        items.append(to_data(item))
        if len(items) > LONGEST:
            raise ValueError(f"a value of more than {LONGEST} items cannot be handed out of the evaluation")
    return items


def from_data(data: Any) -> Any:
    """Return the value of data that nobody vouches for. Raises ValueError for data that `to_data` never gives."""
    if type(data) in ATOMS:
        return data
    if type(data) is list:
        return [from_data(item) for item in data]
    value = _built(data)
    # An expression that sympy writes otherwise when it is built again is another one.
    if to_data(value) != data:
        raise ValueError("the evaluation handed out an expression that sympy would not leave as it is")
    return value


def _expression(value: sympy.Basic) -> dict:
    if isinstance(value, sympy.Float):
        sign, mantissa, exponent, _ = value._mpf_
        return _call("Float", sign, str(int(mantissa)), exponent, value._prec)
    if isinstance(value, sympy.Rational):
        return _call("Rational", str(value.p), str(value.q))
    if isinstance(value, sympy.Symbol) and value == sympy.Symbol(value.name):  # without assumptions
        return _call("Symbol", value.name)
    for name, constant in CONSTANTS.items():
        if value is constant:
            return _call(name)
    name = type(value).__name__
    if FUNCTIONS.get(name) is not type(value):
        raise TypeError(f"a value of type {name} cannot be handed out of the evaluation")
    return _call(name, *map(_expression, value.args))


def _call(name: str, *arguments: Any) -> dict:
    return {"call": [name, list(arguments)]}


def _built(data: Any) -> sympy.Basic:
    match data:
        case {"call": ["Float", [0 | 1 as sign, str(mantissa), int(exponent), int(precision)]]}:
            return sympy.Float((sign, int(mantissa), exponent, int(mantissa).bit_length()), precision=precision)
        case {"call": ["Rational", [str(above), str(below)]]}:
            return sympy.Rational(int(above), int(below))
        case {"call": ["Symbol", [str(name)]]} if name.isidentifier():  # some of sympy writes code with names
            return sympy.Symbol(name)
        case {"call": [str(name), []]} if name in CONSTANTS:
            return CONSTANTS[name]
        case {"call": [str(name), list(arguments)]} if name in FUNCTIONS:
            # Expressions alone: sympy would evaluate an argument that is a string.
            return FUNCTIONS[name](*map(_built, arguments))
    raise ValueError("the evaluation handed out what is no value")
