"""Reads a config.json field by field, with what transformers takes for one that is left out (defaults.py)."""

import math
from typing import Any, NoReturn

from gspo_megatron.errors import ConfigError
from gspo_megatron.models.defaults import DEFAULTS, EXPERT_NAMES, KINDS, NULLABLE

WORDS = {bool: "true or false", int: "a whole number", float: "a number of 0 or more", str: "text",
         list: "a list of layers", dict: "a JSON object"}  # fmt: skip
LONGEST = 500  # characters of what is wrong: a list may have a million entries
# Larger than any model, and small enough that a table of its tensors can be made.
LAYERS, ALL_EXPERTS, LARGEST = 4096, 1 << 20, 1 << 31
POSITIONS = 1 << 24  # there is a table of the angles of all; from here on fp32 does not tell one from the next


class ConfigReader:
    """Reads fields of a family's config.json; every complaint starts with `origin` (the option and the path)."""

    def __init__(self, hf: dict, family: str, origin: str):
        self.hf, self.family, self.origin = hf, family, origin

    def get(self, name: str) -> Any:
        """Return a field's value, or transformers' where the file leaves it out.

        Raises ConfigError: it is left out and has no default, it is null where transformers wants a value, or it is of
        another type than transformers takes.
        """
        if name not in self.hf:
            if name not in DEFAULTS[self.family]:
                self.fail(f"{name} is missing", f"Add the model's own {name} to that file.")
            return DEFAULTS[self.family][name]
        value = self.hf[name]
        if value is None:
            self.require(name in NULLABLE[self.family], f"{name} is null", f"Give the model's own {name}.")
        elif name in KINDS:
            self._check_kind(name, value)
        return value

    def size(self, name: str) -> int:
        """Return a whole number above 0 that a tensor's size can be."""
        value = self.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            self.fail(f"{self.said(name)} is {value!r}, not a whole number above 0", f"Correct {name} in that file.")
        largest = {"num_hidden_layers": LAYERS, "max_position_embeddings": POSITIONS}.get(name, LARGEST)
        self.require(value <= largest, f"{self.said(name)} is over {largest}", f"Correct {name} in that file.")
        return value

    def factor(self, name: str) -> float:
        """Return a number above 0: Megatron takes 0 for none, where transformers computes with it."""
        value = float(self.get(name))
        self.require(value > 0, f"{name} is {value}, and must be above 0", f"Give the model's own {name}.")
        return value

    def said(self, name: str) -> str:
        """Return a field's name, with a word on where its value is from if the file leaves it out."""
        return name if name in self.hf else f"{name} (left out of the file; transformers' default)"

    def require(self, ok: bool, constraint: str, remedy: str) -> None:
        """Raise ConfigError unless ok."""
        if not ok:
            self.fail(constraint, remedy)

    def fail(self, constraint: str, remedy: str) -> NoReturn:
        """Raise ConfigError."""
        if len(constraint) > LONGEST:
            constraint = f"{constraint[:LONGEST]}..."
        raise ConfigError(f"{self.origin}: {constraint}. {remedy}")

    def refuse(self, *names: str) -> None:
        """Refuse fields that are not absent, false or 0: what they turn on is not built."""
        for name in names:
            value = self.get(name) if name in DEFAULTS[self.family] else self.hf.get(name)
            self.require(not value, f"{name} = {value!r} is not supported", "Use a model without it.")

    def experts(self, renormalise: bool) -> dict:
        """Read the number of experts and how many a token gets.

        Args:
            renormalise: weights of the chosen experts add up to 1.
        """
        experts, chosen = self._num_experts(), self.size("num_experts_per_tok")
        layers = self.size("num_hidden_layers")
        self.require(
            experts * layers <= ALL_EXPERTS,
            f"{experts} experts in each of {layers} layers are over {ALL_EXPERTS}",
            "Correct the number of experts in that file.",
        )
        self.require(
            chosen <= experts,
            f"{self.said('num_experts_per_tok')} {chosen} exceeds the number of experts {experts}",
            "Lower num_experts_per_tok.",
        )
        self.require(
            chosen > 1 or not renormalise,
            f"{self.said('num_experts_per_tok')} is 1 and weights are renormalised, so the weight is always 1: no "
            "gradient reaches the router, and Megatron refuses it",
            "Use a model with 2 or more experts a token, or one with norm_topk_prob false.",
        )
        return {"num_experts": experts, "num_experts_per_tok": chosen, "renormalise": renormalise}

    def _num_experts(self) -> int:
        names = EXPERT_NAMES[self.family]
        given = [name for name in names if name in self.hf]
        sizes = {name: self.size(name) for name in given or names[:1]}
        self.require(
            len(set(sizes.values())) == 1,
            " and ".join(f"{name} = {size}" for name, size in sizes.items()) + " contradict each other",
            "Keep the right one.",
        )
        return next(iter(sizes.values()))

    def sparse_steps(self) -> tuple[int, ...]:
        """Make moe_layers of the Qwen families: each decoder_sparse_step-th layer but those of mlp_only_layers."""
        step, dense = self.get("decoder_sparse_step"), self.get("mlp_only_layers") or []
        self.require(step > 0, f"decoder_sparse_step is {step}", "Give 1 or more.")
        return tuple(int((i + 1) % step == 0 and i not in dense) for i in range(self.size("num_hidden_layers")))

    def first_dense(self) -> tuple[int, ...]:
        """Make moe_layers of GLM and DeepSeek: all but the first first_k_dense_replace layers have experts."""
        dense = self.get("first_k_dense_replace")
        return tuple(int(layer >= dense) for layer in range(self.size("num_hidden_layers")))

    def sliding_window(self, switch: bool) -> None:
        """Refuse a window that is in use; one as long as the context hides nothing.

        Args:
            switch: the family has use_sliding_window; without one, a window is always in use.
        """
        window, is_on = self.get("sliding_window"), not switch or self.get("use_sliding_window")
        in_use = is_on and window is not None and window < self.size("max_position_embeddings")
        self.require(not in_use, "sliding-window attention is not supported", "Use a model without it.")

    def full_attention(self) -> None:
        """Refuse layer_types with another kind than full_attention."""
        types = self.get("layer_types") or []
        known = all(kind == "full_attention" for kind in types)
        self.require(known, f"layer_types is {types!r}: full_attention alone is supported", "Use a model without it.")

    def _check_kind(self, name: str, value: Any) -> None:
        kind = KINDS[name]
        allowed = (int, float) if kind is float else kind
        ok = isinstance(value, allowed) and (kind is bool or not isinstance(value, bool))
        ok = ok and (kind is not float or 0 <= value < math.inf)
        if kind is list:
            item = str if name == "layer_types" else int
            ok = ok and all(isinstance(entry, item) and not isinstance(entry, bool) for entry in value)
        self.require(ok, f"{name} is {value!r}, not {WORDS[kind]}", f"Correct {name} in that file.")
