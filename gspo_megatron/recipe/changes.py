"""What a run that goes on may have otherwise than before: one literal table, a reason beside each field.

The first rule that names a field, or a table above it, holds. What no rule of FREE or CHANGEABLE names never changes.
A run's learned values, its place in the data and its record must mean the same before and after; what they mean is
fixed, coefficients and limits are not. docs/resuming.md shows the table.

Left out: what a change does to the learning. That is for who makes it to know.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from gspo_megatron.config import TaskConfig, TrainConfig
from gspo_megatron.recipe.load import flat, plain_values


@dataclass(frozen=True)
class Rule:
    """Says of some fields whether they may change, and why."""

    fields: tuple[str, ...]  # dotted; * is any one part, and what stands below a field is named with it
    why: str
    allows: Callable[[Any, Any], bool] = lambda old, new: True


@dataclass(frozen=True)
class Change:
    """One field with the values of before and now, as a recipe's file has them."""

    field: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.field} = {self.old!r} there, {self.new!r} here"


def both_positive(old: Any, new: Any) -> bool:
    """Tell whether a term is there before and after."""
    return bool(old) and bool(new)


# Every start may have others of these, and nothing is noted: where, how long, how often, what is refused. (The layout
# and the packing change rounding alone.)
FREE = (
    "name",
    "output_dir",
    "resume",
    "steps",
    "num_epochs",
    "eval_interval",
    "max_tokens_per_microbatch",
    "data.max_prompt_length",
    "device",
    "parallel",
    "checkpoint",
    "faults",
    "tracking",
    "save_hf",
    "rollout.save",
)
CHANGEABLE = (
    Rule(
        ("optimizer.lr", "optimizer.lr_decay_style", "optimizer.min_lr", "optimizer.warmup_steps",
         "algorithm.critic.lr", "algorithm.critic.warmup_steps"),
        "the new curve is followed from where the run is, as if it had been the curve from the start of RL",
    ),
    Rule(
        ("optimizer.weight_decay", "optimizer.adam_eps", "optimizer.clip_grad"),
        "each optimizer step reads them anew; Adam's moments do not depend on them",
    ),
    Rule(
        ("algorithm.clip_ratio_low", "algorithm.clip_ratio_high", "algorithm.clip_ratio_dual",
         "algorithm.critic.clip_value"),
        "they bound the next updates",
    ),
    Rule(
        ("algorithm.kl.coef",),
        "between values above 0: the reference stays the policy that RL began with. From 0 there is none to compare "
        "with, and to 0 it would be lost",
        both_positive,
    ),
    Rule(
        ("algorithm.entropy_coef", "algorithm.overlong_buffer", "algorithm.overlong_penalty",
         "algorithm.mismatch.threshold", "algorithm.critic.gae_lambda", "algorithm.preference.beta"),
        "they weigh terms of the next losses and rewards",
    ),
    Rule(
        ("algorithm.resampling_rounds",),
        "between values above 0, where it is a limit; 0 makes other batches",
        both_positive,
    ),
    Rule(
        ("rollout.temperature", "rollout.top_k", "rollout.top_p"),
        "the next responses are sampled so, those of evaluations too: eval/accuracy changes with them, its greedy "
        "sister does not",
    ),
    Rule(
        ("rollout.max_response_length",),
        "longer ones take more memory; where the loss divides by it (constant_length), or the overlong buffer is a "
        "fifth of it, that changes too",
    ),
    Rule(
        ("tasks.*.weight",),
        "the next prompts are drawn by it; the rows of each task go on where they are, and held-out prompts stay those "
        "of the first weights",
    ),
    Rule(
        ("tasks.*.max_turns",),
        "it is a limit of the next episodes",
    ),
    Rule(
        ("tasks.*.reward.*.weight", "tasks.*.on_error"),
        "the next rewards are sums with these; those of each function are in the record under its name",
    ),
    Rule(
        ("tasks.*.concurrency", "tasks.*.isolate"),
        "they say how reward functions are called, not what they give",
    ),
    Rule(
        ("routing.statistics", "routing.diagnostics_interval"),
        "they say what is measured",
    ),
)  # fmt: skip
NEVER = (
    Rule(("seed",), "it fixes the initial weights, the order of the prompts and every draw"),
    Rule(("model",), "the weights are of this model"),
    Rule(("data.max_prompt_length",), "a task leaves out what is longer, so it says which rows are trained on"),
    Rule(("data",), "the tokenizer and the held-out prompts are made with it, and curves compare those"),
    Rule(("tasks.*.correct_at",), "eval/accuracy would mean something else from here on"),
    Rule(("tasks",), "it says which prompts there are, and what a response to one is worth"),
    Rule(("warm_start",), "RL starts from what it made"),
    Rule(
        ("rollout.num_prompts", "rollout.group_size", "algorithm.num_minibatches", "algorithm.preference.batch_size"),
        "it says what a batch is",
    ),
    Rule(("algorithm.kl.coef", "algorithm.resampling_rounds"), "it changes between values above 0 alone"),
    Rule(("algorithm.critic.gamma",), "the critic's values would mean something else"),
    Rule(("algorithm",), "it says what is optimised; coefficients of it may change"),
    Rule(("rollout",), "it says where responses come from and where they end"),
    Rule(("optimizer",), "Adam's moments are means with these decays, and its bias correction counts from step 1"),
    Rule(("routing",), "it says what an update computes"),
)


def differences(config: TrainConfig, there: dict[str, Any]) -> list[Change]:
    """Return what a recipe has otherwise than a run's, but for FREE.

    Args:
        there: plain values of the run's recipe (recipe.load.read_saved), which may be an earlier version's.
    """
    free = set(FREE) - ({"data.max_prompt_length"} if _drops_by_length(config) else set())
    return [one for one in _all_differences(config, there) if not _is_named(tuple(sorted(free)), one.field)]


def noted(config: TrainConfig, there: dict[str, Any]) -> list[Change]:
    """Return what a start makes a note of: CHANGEABLE fields, and `steps` where the learning rate's curve ends with
    them."""
    curve = ("steps",) if config.optimizer.lr_decay_style != "constant" else ()
    fields = (*curve, *(name for rule in CHANGEABLE for name in rule.fields))
    return [one for one in _all_differences(config, there) if _is_named(fields, one.field)]


def refusal(change: Change) -> str | None:
    """Return why a run cannot go on with a change, with both values; None where it can."""
    if any(_is_named(rule.fields, change.field) and rule.allows(change.old, change.new) for rule in CHANGEABLE):
        return None
    why = next((rule.why for rule in NEVER if _is_named(rule.fields, change.field)), "nothing of the run knows it")
    return f"{change}: {why}"


def refusals(changes: Iterable[Change]) -> list[str]:
    """Return those of several changes."""
    return [said for change in changes if (said := refusal(change)) is not None]


def _all_differences(config: TrainConfig, there: dict[str, Any]) -> list[Change]:
    old = flat(there)
    plain = dataclasses.replace(config, algorithm=config.algorithm.resolved())
    tasks = {name: TaskConfig() for name in _tasks(old)}
    bare = TrainConfig(tasks=tasks) if tasks else TrainConfig()
    new, defaults = (flat(plain_values(one)) for one in (plain, bare))
    # A run that an earlier version began does not know the fields that were added since: their defaults are its values.
    tables = {name[:place] for name in old for place, letter in enumerate(name) if letter == "."}
    old = {name: value for name, value in defaults.items() if name not in tables} | old
    old, new = _spelled_out(old), _spelled_out(new)
    alone = {f"tasks.{name}." for name in set(_tasks(old)) ^ set(_tasks(new))}
    names = [name for name in dict.fromkeys([*new, *old]) if not any(name.startswith(task) for task in alone)]
    return [Change(name, old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)]


def _spelled_out(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe's values with the names of its tasks as one, and each reward function's weight as a field."""
    found: dict[str, Any] = {"tasks": _tasks(values)}
    for name, value in values.items():
        parts = name.split(".")
        is_reward = parts[0] == "tasks" and len(parts) == 3 and parts[2] == "reward"
        if is_reward and isinstance(value, list) and all(isinstance(one, dict) for one in value):
            functions = [str(one.get("function")) for one in value]
            found[name] = functions
            weights = zip(functions, value, strict=True)
            found |= {f"{name}.{function.rpartition(':')[2]}.weight": one.get("weight") for function, one in weights}
        elif value != {}:  # an empty table; what one with entries has stands below its name
            found[name] = value
    return found


def _tasks(values: dict[str, Any]) -> list[str]:
    return sorted({name.split(".")[1] for name in values if name.startswith("tasks.")})


def _is_named(patterns: tuple[str, ...], field: str) -> bool:
    return any(_compiled(pattern).fullmatch(field) for pattern in patterns)


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*", r"[^.]+") + r"(\..*)?")


def _drops_by_length(config: TrainConfig) -> bool:
    """Whether the limit on prompts says which rows are trained on."""
    return any(task.overlong == "drop" for task in config.tasks.values())
