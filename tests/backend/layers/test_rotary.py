"""Scaled rotary frequencies by hand. That they make transformers' logits is tested in hf/test_round_trip.py."""

import math

import pytest

from gspo_megatron.backend.layers.rotary import inverse_frequencies
from gspo_megatron.errors import ConfigError
from gspo_megatron.models.families import architecture
from tools.validation.round_trip import TINY

# Heads of 12 (48 over 4), of which llama rotates all: frequencies 10000^(-k/6).
LLAMA = TINY["llama"]


def test_yarn_by_hand():
    """Two pairs of dimensions, base 10000: plain frequencies 1 and 1/100. A context of 16 is stretched 4 times. The
    dimension at which 32 rotations fit is 4 ln(16 / 64 pi) / (2 ln 10000) = -0.549, so low is max(-1, 0) = 0; for one
    rotation 4 ln(16 / 2 pi) / (2 ln 10000) = 0.203, so high is 1. The first pair keeps its frequency, the second is
    stretched wholly: 1/400. Cosines get (0.07 ln 4 + 1) / (0.1 ln 4 + 1)."""
    arch = architecture(TINY["deepseek_v3"] | {"qk_rope_head_dim": 4})
    assert inverse_frequencies(arch).tolist() == pytest.approx([1.0, 1 / 400], rel=1e-6)
    assert arch.rope_scaling.attention_factor == pytest.approx((0.07 * math.log(4) + 1) / (0.1 * math.log(4) + 1))


def test_yarn_without_rounding_by_hand():
    """Two pairs of dimensions, base e: plain frequencies 1 and exp(-1/2). A context of 2 pi e, so dimension(r) is
    2 ln(e / r): 0.5 for r = exp(0.75), 1.25 for r = exp(0.375). The second pair is 2/3 of the way up the ramp, so it is
    stretched 4 times by two thirds: 1/3 + 2/3 / 4 = 1/2. Rounded to 0 and 2 it would be half-way: 5/8."""
    rope = {
        "rope_type": "yarn",
        "rope_theta": math.e,
        "factor": 4.0,
        "beta_fast": math.exp(0.75),
        "beta_slow": math.exp(0.375),
        "original_max_position_embeddings": 2 * math.pi * math.e,
    }
    for truncate, share in ((False, 1 / 2), (True, 5 / 8)):
        arch = architecture(LLAMA | {"head_dim": 4, "rope_parameters": rope | {"truncate": truncate}})
        assert inverse_frequencies(arch).tolist() == pytest.approx([1.0, share * math.exp(-0.5)], rel=1e-6)


def test_plain_and_linear():
    plain = [10000 ** (-k / 6) for k in range(6)]
    assert inverse_frequencies(architecture(LLAMA)).tolist() == pytest.approx(plain, rel=1e-6)
    scaled = LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}}  # as older folders have it
    assert inverse_frequencies(architecture(scaled)).tolist() == pytest.approx([f / 4 for f in plain], rel=1e-6)


def test_llama3_by_hand():
    """A context of 20 pi has 10 f turns. With limits 1 and 4: f = 1 has 10 and is kept; f = 0.25 has 2.5, half-way, so
    it is the mean of 0.25 and 0.25 / 8; f = 0.0625 has 0.625 and is divided by 8. Base 64 and heads of 6 make these."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 64.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 20 * math.pi,
    }
    found = inverse_frequencies(architecture(LLAMA | {"head_dim": 6, "rope_parameters": rope}))
    assert found.tolist() == pytest.approx([1.0, (0.25 + 0.25 / 8) / 2, 0.0625 / 8], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "rope", "words"),
    [
        ("llama", {"rope_type": "yarn"}, "rope_type 'yarn' has no factor"),
        ("glm4_moe", {"rope_type": "yarn", "partial_rotary_factor": 0.5}, "one of: linear, llama3."),
        ("llama", {"rope_type": "llama3", "factor": 8.0}, "rope_type 'llama3' has no low_freq_factor"),
        ("deepseek_v3", {"rope_type": "llama3"}, "one of: yarn"),
        ("deepseek_v3", {"rope_type": "yarn", "attention_factor": 2.0}, "yarn with an attention_factor"),
    ],
)
def test_other_scalings_are_refused(name, rope, words):
    with pytest.raises(ConfigError) as caught:
        architecture(TINY[name] | {"rope_parameters": rope})
    assert words in str(caught.value)
