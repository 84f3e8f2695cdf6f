"""Pickles that run code or change what is loaded, made of types that belong into a checkpoint."""

import io
import os
import pickle
from pathlib import Path

import torch


class MakesFolder:
    """Whoever unpickles it makes a folder."""

    def __init__(self, victim: Path):
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (str(self.victim),)


class ByState:
    """Pickles as an object of an allowed class, made without arguments, that is then given any state by BUILD."""

    def __init__(self, kind: type, state: object, entries: dict | None = None):
        self.kind, self.state, self.entries = kind, state, entries or {}

    def __reduce__(self):
        return self.kind, (), self.state, None, iter(self.entries.items())


class SetsAttributes:
    """BUILD with a state of slots on a class, not on one of its objects: its attributes are set for the whole process,
    also where the file is refused in the end."""

    def __init__(self, kind: type, attributes: dict):
        self.kind, self.attributes = kind, attributes

    def pickled(self) -> bytes:
        out = io.BytesIO()
        name = f"c{self.kind.__module__}\n{self.kind.__qualname__}\n".encode()
        out.write(b"\x80\x02" + name + pickle.dumps((None, self.attributes), protocol=2)[2:-1] + b"b.")
        return out.getvalue()


def torch_saved(harm: object) -> bytes:
    out = io.BytesIO()
    torch.save(harm, out)
    return out.getvalue()
