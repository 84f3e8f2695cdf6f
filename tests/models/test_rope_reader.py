"""rope_parameters, rope_scaling and the fields beside them: transformers' own angles, in every family, or a refusal."""

import copy
import importlib
import itertools

import pytest
import torch
from transformers import CONFIG_MAPPING

from gspo_megatron.backend.layers.rotary import inverse_frequencies
from gspo_megatron.errors import ConfigError
from gspo_megatron.models.families import FAMILIES, architecture
from gspo_megatron.models.rope_scaling import Yarn
from tools.validation.round_trip import TINY

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
PARTS = {  # field -> what may stand there
    "rope_parameters": (
        None,
        {},
        {"rope_type": "default", "rope_theta": 500.0},
        {"rope_theta": 700.0, "partial_rotary_factor": 0.5},
        YARN | {"rope_theta": 300.0, "beta_fast": 8, "truncate": False},
    ),
    "rope_scaling": (
        None,
        YARN,
        {"type": "yarn", "factor": 2.0, "rope_theta": 500.0},
        {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16},
        {"type": "linear", "factor": 4},
        LLAMA3,
        {"type": "linear", "factor": 4.0, "partial_rotary_factor": 0.5},
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 1, "beta_slow": 32},
    ),
    "rope_theta": (None, 500.0),
    "partial_rotary_factor": (None, 0.5, 1.0),
    "original_max_position_embeddings": (None, 32),
}


def variants() -> list[dict]:
    """List configs with every pair of the fields, and every one alone."""
    found: list[dict] = [{}]
    for first, second in itertools.combinations(PARTS, 2):
        for a, b in itertools.product(PARTS[first], PARTS[second]):
            given = {name: value for name, value in ((first, a), (second, b)) if value is not None}
            if given not in found:
                found.append(given)
    return found


def theirs(family: str, config: dict) -> tuple[torch.Tensor, float]:
    """Return the frequencies of transformers' model and its factor on cosine and sine."""
    cls = CONFIG_MAPPING[family]
    made = cls(**{key: copy.deepcopy(value) for key, value in config.items() if key != "model_type"})  # it fills in
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    rotary = getattr(module, cls.__name__.removesuffix("Config") + "RotaryEmbedding")(made)
    return rotary.inv_freq, rotary.attention_scaling


@pytest.mark.parametrize("family", FAMILIES)
def test_the_angles_are_transformers(family):
    """Whatever is not refused has its frequencies. Of 80 combinations more than a third is read in each family."""
    plain = {key: value for key, value in TINY[family].items() if key not in PARTS}
    if family == "mixtral":
        plain["head_dim"] = 12  # transformers' yarn fails at Mixtral's null
    refused = read = 0
    for given in variants():
        try:
            arch = architecture(plain | given)
        except ConfigError:
            refused += 1
            continue
        read += 1
        frequencies, factor = theirs(family, plain | given)
        torch.testing.assert_close(inverse_frequencies(arch), frequencies.float(), rtol=1e-6, atol=0, msg=str(given))
        own = arch.rope_scaling.attention_factor if isinstance(arch.rope_scaling, Yarn) else 1.0
        assert own == pytest.approx(factor, rel=1e-12), given
    assert read > (refused + read) / 3


def test_a_scaling_beside_plain_parameters_is_taken():
    """A folder that transformers 5 saved, to which a user adds what a model card says."""
    saved = TINY["llama"] | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    found = architecture(saved | {"rope_scaling": YARN})
    assert isinstance(found.rope_scaling, Yarn) and found == architecture(TINY["llama"] | {"rope_parameters": YARN})


@pytest.mark.parametrize(
    ("parameters", "scaling", "words"),
    [
        ({"rope_theta": 500.0}, YARN, "rope_parameters says rope_theta = 500.0, and rope_scaling, which transformers"),
        ({"rope_theta": 500.0}, YARN | {"rope_theta": 700.0}, "makes it 700.0"),
        ({"rope_type": "linear", "factor": 4.0}, YARN, "rope_parameters says rope_type = 'linear'"),
        (YARN | {"factor": 8.0}, YARN, "rope_parameters says factor = 8.0"),
        ({"full_attention": {"rope_theta": 5.0}}, None, "by layer type (full_attention)"),
        (YARN | {"factor": 0}, None, "factor is 0, not a number above 0"),
        (YARN | {"factor": "4"}, None, "factor is '4', not a number above 0"),
        ({"rope_theta": None}, None, "rope_theta is None, not a number above 0"),
        (LLAMA3 | {"low_freq_factor": 8.0}, None, "low_freq_factor 8 is above high_freq_factor 4"),
        (["yarn"], None, "rope_parameters is ['yarn'], not a JSON object"),
    ],
)
def test_contradictions_and_other_values_are_refused(parameters, scaling, words):
    with pytest.raises(ConfigError) as caught:
        architecture(TINY["llama"] | {"rope_parameters": parameters, "rope_scaling": scaling}, "model.load_hf = 'x'")
    assert str(caught.value).startswith("model.load_hf = 'x': ") and words in str(caught.value)


def test_the_same_said_twice_is_no_contradiction():
    both = {"rope_parameters": YARN | {"rope_theta": 500.0}, "rope_scaling": YARN | {"rope_theta": 500.0}}
    assert architecture(TINY["llama"] | both) == architecture(TINY["llama"] | {"rope_scaling": both["rope_scaling"]})
