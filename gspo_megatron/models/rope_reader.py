"""What a config.json says about rotary angles, as transformers reads it.

transformers takes `rope_scaling` where there is one, in place of all of `rope_parameters`, and fills in what it lacks
from rope_theta and partial_rotary_factor beside it, else from the class. Where that drops what rope_parameters says,
the two contradict each other, and the file is refused: nobody means a model at another base than it was trained with.

Left out, and refused: other scalings than linear, llama3 and yarn; an attention_factor; parameters by layer type.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gspo_megatron.models.config_reader import ConfigReader
from gspo_megatron.models.defaults import DEFAULTS
from gspo_megatron.models.rope_scaling import Linear, Llama3, Yarn

ORIGINAL = "original_max_position_embeddings"
PARTIAL = "partial_rotary_factor"


@dataclass(frozen=True)
class Rope:
    """Rotary angles of a model."""

    theta: float
    share: float  # of each head's dimensions, the first of which are rotated
    scaling: Linear | Llama3 | Yarn | None


class RopeReader:
    """Reads the one JSON object that counts."""

    def __init__(self, config: ConfigReader):
        self.config = config
        self.rope = self._chosen()
        self._check_contradiction()

    def read(self, kinds: tuple[str, ...]) -> Rope:
        """Return the angles. A scaling other than `kinds` is refused."""
        kind = self.rope["rope_type"]
        theta, share = self._number("rope_theta"), self._share(kind)
        if share != 1:  # yarn's factor on cosine and sine goes into the softmax's scale, which the whole head has
            kinds = tuple(known for known in kinds if known != "yarn")
        readers: dict[str, Callable[[], Linear | Llama3 | Yarn]]
        readers = {"linear": self._linear, "llama3": self._llama3, "yarn": self._yarn}
        self.config.require(
            kind == "default" or kind in kinds,
            f"rope_type {kind!r} is not supported" + (f" with {PARTIAL} {share:g}" if share != 1 else ""),
            f"Use a model with one of: {', '.join(kinds)}.",
        )
        return Rope(theta, share, None if kind == "default" else readers[kind]())

    def _chosen(self) -> dict[str, Any]:
        """The object that transformers takes, filled in from the fields beside it."""
        config = self.config
        scaling = config.get("rope_scaling") if config.hf.get("rope_scaling") is not None else None
        parameters = config.get("rope_parameters")
        if parameters is None:
            parameters = DEFAULTS[config.family]["rope_parameters"]
        chosen = dict(scaling or parameters or {})
        nested = [name for name, value in chosen.items() if isinstance(value, dict)]
        config.require(not nested, f"rotary parameters by layer type ({', '.join(nested)})", "Use a model without.")
        chosen.setdefault("rope_theta", config.get("rope_theta"))
        if PARTIAL in DEFAULTS[config.family] or PARTIAL in config.hf:
            chosen.setdefault(PARTIAL, config.get(PARTIAL))
        chosen.setdefault("rope_type", chosen.get("type", "default"))
        if ORIGINAL in config.hf:
            chosen[ORIGINAL] = config.hf[ORIGINAL]
        chosen.setdefault(ORIGINAL, config.size("max_position_embeddings"))
        return chosen

    def _check_contradiction(self) -> None:
        """Refuse a rope_parameters of which rope_scaling beside it would drop something."""
        parameters, scaling = (self.config.hf.get(name) or {} for name in ("rope_parameters", "rope_scaling"))
        if not scaling:
            return
        for name, value in parameters.items():
            key = "rope_type" if name == "type" else name
            says_nothing = value is None or (key == "rope_type" and value == "default")
            self.config.require(
                says_nothing or self.rope.get(key) == value,
                f"rope_parameters says {name} = {value!r}, and rope_scaling, which transformers takes in its place, "
                f"makes it {self.rope.get(key)!r}",
                "Put all of it into rope_parameters, and remove rope_scaling.",
            )

    def _share(self, kind: str) -> float:
        """Return the part of a head that is rotated. Most families' plain angles do not know of a part."""
        if kind == "default" and PARTIAL not in DEFAULTS[self.config.family]:
            return 1.0
        share = self._number(PARTIAL, 1.0)
        self.config.require(share <= 1, f"{PARTIAL} is {share:g}, above 1", "Give 1 or less.")
        self.config.require(
            share == 1 or PARTIAL in DEFAULTS[self.config.family],
            f"rope_type {kind!r} with {PARTIAL} {share:g} is not supported in {self.config.family}",
            "Use a model that rotates whole heads.",
        )
        return share

    def _number(self, name: str, default: float | None = None) -> float:
        """Return a number above 0 of the object."""
        value: Any = self.rope.get(name, default)
        if name not in self.rope and default is None:
            self.config.fail(f"rope_type {self.rope['rope_type']!r} has no {name}", "Add it to that file.")
        ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
        self.config.require(ok, f"{name} is {value!r}, not a number above 0", f"Correct {name} in that file.")
        return value

    def _optional(self, name: str, default: float) -> float:
        """Return a number of yarn, whose absence, null and 0 mean the default."""
        return float(self._number(name)) if self.rope.get(name) else default

    def _linear(self) -> Linear:
        return Linear(float(self._number("factor")))

    def _llama3(self) -> Llama3:
        names = ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL)
        found = Llama3(*(self._number(name) for name in names))
        self.config.require(
            found.low_freq_factor <= found.high_freq_factor,
            f"low_freq_factor {found.low_freq_factor:g} is above high_freq_factor {found.high_freq_factor:g}",
            "Correct the two.",
        )
        return found

    def _yarn(self) -> Yarn:
        self.config.require(
            self.rope.get("attention_factor") is None,
            "yarn with an attention_factor is not supported",
            "Use a model without it.",
        )
        truncate = self.rope.get("truncate", True)
        self.config.require(
            isinstance(truncate, bool), f"truncate is {truncate!r}, not true or false", "Correct it in that file."
        )
        return Yarn(
            factor=self._factor(),
            original_max_position_embeddings=self._number(ORIGINAL),
            beta_fast=self._optional("beta_fast", 32.0),
            beta_slow=self._optional("beta_slow", 1.0),
            mscale=self._optional("mscale", 0.0),
            mscale_all_dim=self._optional("mscale_all_dim", 0.0),
            truncate=truncate,
        )

    def _factor(self) -> float:
        """Return yarn's factor; null means the ratio of the two contexts, but for latent attention's own scale."""
        if "factor" in self.rope and self.rope["factor"] is None and not self.rope.get("mscale_all_dim"):
            return self.config.size("max_position_embeddings") / self._number(ORIGINAL)
        return float(self._number("factor"))
