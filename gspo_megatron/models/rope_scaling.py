"""Ways in which rotary angles are scaled for a longer context. Imports no torch; the angles are rotary.py's."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Linear:
    """Rotary angles of positions divided by a factor."""

    factor: float


@dataclass(frozen=True)
class Llama3:
    """Rotary angles of Llama 3.1 and later: long wavelengths are stretched, short ones kept."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: float


@dataclass(frozen=True)
class Yarn:
    """Rotary angles for a longer context than the original one (arXiv 2309.00071)."""

    factor: float
    original_max_position_embeddings: float
    beta_fast: float
    beta_slow: float
    mscale: float  # 0: not given
    mscale_all_dim: float
    truncate: bool = True  # the ramp begins and ends at whole dimensions

    @property
    def attention_factor(self) -> float:
        """Cosine and sine are multiplied by this."""
        if self.mscale and self.mscale_all_dim:
            return self._temperature(self.mscale) / self._temperature(self.mscale_all_dim)
        return self._temperature(1.0)

    def _temperature(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0
