"""Values that no recipe can mean."""

import pytest

from gspo_megatron.config import RolloutConfig, TrainConfig
from gspo_megatron.errors import ConfigError


@pytest.mark.parametrize("text", ["\udc80", "a\ud800b"])
def test_half_a_surrogate_pair_is_refused_by_its_field(text):
    """As of an argument that is not UTF-8; a tokenizer would fail on it in the ranks."""
    with pytest.raises(ConfigError, match=r"rollout.stop\[1\] = .*: is no Unicode text"):
        TrainConfig(rollout=RolloutConfig(stop=("\U0001f600", text)))
