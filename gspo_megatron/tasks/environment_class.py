"""Users' environments, in the process of their own: a class is found, known by its methods, and called.

A class has TRL's shape: `reset(**columns) -> str | None`, public methods that are tools, and optionally `get_reward()`.
With a method `step(text) -> (observation, done)`, or `(observation, done, reward)`, it is a text game instead, and its
other methods are its own. Any of them may be async. An instance is one episode; it is made without arguments.

Left out: tools that come and go between turns, and observations that are not text.
"""

import asyncio
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gspo_megatron.tasks.reward_functions import LoadError, asked_for, is_async, named
from gspo_megatron.tasks.reward_values import WrongValue, one_line, score
from gspo_megatron.tasks.tool_calls import BadCall, ToolCall, calls_in, check_types

OWN = ("reset", "step", "get_reward")  # methods that are no tools
LONGEST = 1 << 20  # characters of an observation


@dataclass(frozen=True)
class Turn:
    """What an environment answers to one response of the model."""

    messages: tuple[dict[str, str], ...]  # what the model sees next; () where the episode is over
    done: bool
    reward: float | None = None


@dataclass(frozen=True)
class EnvironmentClass:
    """A class that was found, and what it has."""

    target: str
    make: Callable[[], Any]
    is_game: bool  # it has step()
    has_reward: bool
    takes: tuple[str, ...] | None  # parameters of reset; None: **kwargs, so all columns
    required: tuple[str, ...]  # columns without which it cannot be reset
    tools: tuple[str, ...]  # names of methods

    def schemas(self) -> list[dict[str, Any]]:
        """Return what the chat template is told of the tools, from their signatures and docstrings.

        Raises:
            LoadError: one has no docstring, or a parameter without a type or a description, or there is no torch.
        """
        if not self.tools:
            return []
        from transformers.utils import get_json_schema  # which imports torch

        made, found = self.make(), []
        for name in self.tools:
            try:
                found.append(get_json_schema(getattr(made, name)))
            except (OSError, ImportError, MemoryError) as error:  # torch's, which it imports
                raise LoadError(
                    f"its tools cannot be described: {one_line(error)}. torch must be importable, and behind walls fit "
                    "into faults.reward_memory_gb."
                ) from None
            except Exception as error:  # of transformers, for a docstring that it cannot read
                raise LoadError(
                    f"its tool {name} cannot be described ({one_line(error)}). Give it a docstring with Args, and its "
                    "parameters types."
                ) from None
        return found


async def reset(known: EnvironmentClass, columns: dict[str, Any]) -> tuple[Any, str | None]:
    """Return a new episode, and what it says first.

    Args:
        columns: of a row, those that reset takes.

    Raises:
        WrongValue: reset() returned something else than a text or None.
    """
    made = known.make()
    return made, _text("reset()", await _called(made.reset, **columns), may_be_none=True)


async def turn(known: EnvironmentClass, made: Any, text: str) -> Turn:
    """Return what the episode answers to a response.

    Raises:
        WrongValue: step() returned something else than its two or three values.
    """
    return await (_played(made, text) if known.is_game else _used(known, made, text))


async def reward(made: Any) -> float:
    """Return what get_reward() gives. Raises WrongValue where that is no finite number."""
    found = score(await _called(made.get_reward))
    if found is None:
        raise WrongValue("returned None from get_reward(), where a number belongs")
    return found


def found(target: str) -> EnvironmentClass:
    """Return the environment that a recipe names: "file.py:Class" or "module:Class".

    Raises:
        LoadError: it cannot be found, or is none.
    """
    made = named(target, "class")
    name = target.rpartition(":")[2]
    if not inspect.isclass(made):
        raise LoadError(f"{name} is a value of type {type(made).__name__}, not a class. An environment is a class.")
    _, required = asked_for(inspect.signature(made).parameters.values())
    if required:
        raise LoadError(f"{name}({', '.join(required)}) wants arguments, and it is made without. Give them defaults.")
    begin = getattr(made, "reset", None)
    if not callable(begin):
        raise LoadError(f"{name} has no reset(**columns), with which an episode begins. Add it.")
    is_game = callable(getattr(made, "step", None))
    public = [key for key, value in inspect.getmembers(made, callable) if not key.startswith("_") and key not in OWN]
    if not is_game and not public:
        raise LoadError(f"{name} has no step(text) and no public method that is a tool. Add one of them.")
    takes, required = asked_for(list(inspect.signature(begin).parameters.values())[1:])
    return EnvironmentClass(
        target,
        made,
        is_game,
        callable(getattr(made, "get_reward", None)),
        takes,
        required,
        () if is_game else tuple(public),
    )


async def _called(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a method where it cannot hold up the others: an async one in the loop, another in a thread."""
    if is_async(method):
        return await method(*args, **kwargs)
    return await asyncio.to_thread(method, *args, **kwargs)


async def _played(made: Any, text: str) -> Turn:
    returned = await _called(made.step, text)
    if not isinstance(returned, tuple | list) or len(returned) not in (2, 3):
        raise WrongValue(f"returned {_shown(returned)} from step(), where (observation, done) belongs")
    done = returned[1]
    if type(done).__name__ not in ("bool", "bool_"):  # numpy's is one too
        raise WrongValue(f"returned {_shown(done)} for done from step(), where True or False belongs")
    observation = _text("step()", returned[0], may_be_none=bool(done))
    gained = score(returned[2]) if len(returned) == 3 else None
    messages = () if done else ({"role": "user", "content": observation or ""},)
    return Turn(messages, bool(done), gained)


async def _used(known: EnvironmentClass, made: Any, text: str) -> Turn:
    """A response without a call is the answer, and ends the episode. A tool's error is told to the model."""
    calls = calls_in(text)
    longest = LONGEST // max(len(calls), 1)
    return Turn(tuple([await _result(known, made, call, longest) for call in calls]), not calls)


async def _result(known: EnvironmentClass, made: Any, call: ToolCall, longest: int) -> dict[str, str]:
    try:
        name, arguments = call.checked(known.tools)
        check_types(name, getattr(made, name), arguments)
        returned = await _called(getattr(made, name), **arguments)
        content = returned if isinstance(returned, str) else json.dumps(returned, ensure_ascii=False, default=str)
    except BadCall as error:
        name, content = "error", f"error: {error}"
    except Exception as error:
        name, content = call.name, f"error: {type(error).__name__}: {' '.join(str(error).split())}"
    return {"role": "tool", "name": name, "content": _encodable(content[:longest])}


def _text(method: str, value: Any, may_be_none: bool) -> str | None:
    if isinstance(value, str) and len(value) <= LONGEST:
        return _encodable(value)
    if value is None and may_be_none:
        return None
    what = f"a text of {len(value)} characters" if isinstance(value, str) else _shown(value)
    limit = f"a text of at most {LONGEST} characters" if isinstance(value, str) else "a text"
    raise WrongValue(f"returned {what} from {method}, where {limit} belongs")


def _encodable(text: str) -> str:
    """Half of a surrogate pair is no Unicode text, and no tokenizer can encode it."""
    return text.encode("utf-8", "replace").decode()


def _shown(value: Any) -> str:
    return f"a value of type {type(value).__name__}"
