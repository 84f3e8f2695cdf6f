"""What a field means that config.json leaves out, or gives as null: compared with transformers' classes, all families
and all fields."""

import dataclasses

import pytest
from transformers import CONFIG_MAPPING

from gspo_megatron.errors import ConfigError
from gspo_megatron.models.defaults import DEFAULTS, EXPERT_NAMES, KINDS, NULLABLE
from gspo_megatron.models.families import FAMILIES, architecture
from tools.validation.round_trip import TINY

# Sizes of tensors: a file that lacks one is refused, whatever transformers would take.
SIZES = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "q_lora_rank",
         "moe_intermediate_size", "shared_expert_intermediate_size", "n_shared_experts", "kv_lora_rank",
         "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "linear_num_key_heads", "linear_num_value_heads",
         "linear_key_head_dim", "linear_value_head_dim", "linear_conv_kernel_dim"}  # fmt: skip
# Not a field of the class: filled in elsewhere in it, and compared by test_what_the_class_fills_in.
NO_FIELD = {"rope_theta", "partial_rotary_factor", "full_attention_interval", "head_dim", "attention_bias"}


class Watched(dict):
    """A config.json that notes which fields were looked for."""

    def __init__(self, values: dict):
        super().__init__(values)
        self.seen: set[str] = set()

    def __contains__(self, name: object) -> bool:
        self.seen.add(str(name))
        return super().__contains__(name)

    def get(self, name: str, default: object = None) -> object:
        self.seen.add(name)
        return super().get(name, default)


def fields(family: str) -> dict[str, object]:
    """Return the fields of transformers' class with their defaults."""
    return {field.name: field.default for field in dataclasses.fields(CONFIG_MAPPING[family])}


def read_fields(family: str) -> list[str]:
    """Return the fields of the family's class that we read."""
    watched = Watched(TINY[family])
    architecture(watched)
    return sorted(watched.seen & fields(family).keys())


def whole(family: str) -> dict:
    """Return a tiny config in which every field that we read is spelled out."""
    mine = CONFIG_MAPPING[family](**{k: v for k, v in TINY[family].items() if k != "model_type"})
    given = {name: getattr(mine, name) for name in read_fields(family)}
    return {name: value for name, value in given.items() if value is not None} | TINY[family]


CASES = [(family, name) for family in FAMILIES for name in read_fields(family)]


def test_every_family_has_a_row():
    assert DEFAULTS.keys() == NULLABLE.keys() == FAMILIES.keys()
    assert sum(len(row) for row in DEFAULTS.values()) > 150 and len(CASES) > 200


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_is_the_class(family):
    """Each entry has the default of the class's field; a name that is no field is one that the class fills in."""
    theirs = fields(family)
    for name, value in DEFAULTS[family].items():
        if name in theirs and name != "rope_parameters":
            assert theirs[name] == value and type(theirs[name]) is type(value), name
        else:
            assert name in NO_FIELD | {"rope_parameters"}
    kinds = {name for row in DEFAULTS.values() for name in row} - {"num_key_value_heads", "head_dim"}
    assert kinds - KINDS.keys() == {"max_position_embeddings", "num_experts_per_tok"}  # sizes


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_class_fills_in(family):
    """Rotary parameters stand in one place once a config is made."""
    made, row = CONFIG_MAPPING[family](), DEFAULTS[family]
    filled = {"rope_type": "default"} | (row["rope_parameters"] or {}) | {"rope_theta": row["rope_theta"]}
    if "partial_rotary_factor" in row:
        filled["partial_rotary_factor"] = row["partial_rotary_factor"]
    assert made.rope_parameters == filled
    if "full_attention_interval" in row:
        assert made.layer_types[:8] == (["linear_attention"] * 3 + ["full_attention"]) * 2
    assert ("attention_bias" in fields(family)) or not row["attention_bias"]


@pytest.mark.parametrize("family", EXPERT_NAMES)
def test_the_number_of_experts_has_the_names_that_the_class_knows(family):
    names, made = EXPERT_NAMES[family], CONFIG_MAPPING[family]
    assert names[0] in fields(family) and len(names) <= 2
    plain = {k: v for k, v in TINY[family].items() if k not in ("num_experts", "num_local_experts", "n_routed_experts")}
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        taken = getattr(made.from_dict({name: 6}), names[0])
        assert (taken == 6) == (name in names), name
        if name in names:
            assert architecture(plain | {name: 8}).num_experts == 8
        else:
            with pytest.raises(ConfigError, match=f"{names[0]} is missing"):
                architecture(plain | {name: 8})


@pytest.mark.parametrize(("family", "name"), CASES)
def test_a_field_that_is_left_out(family, name):
    """The model is the one with the class's value written down, or the file is refused by the field's name."""
    config = whole(family)
    without = {key: value for key, value in config.items() if key != name}
    wanted = fields(family)[name]
    try:
        expected = architecture(config | {name: wanted})
    except ConfigError:
        expected = None  # the default does not fit the tiny model
    try:
        found = architecture(without)
    except ConfigError as error:
        assert name in str(error)
        assert expected is None or name in SIZES | set(EXPERT_NAMES.get(family, ()))
        if name in SIZES:
            assert f"{name} is missing. Add the model's own {name}" in str(error)
    else:
        assert found == expected


@pytest.mark.parametrize(("family", "name"), CASES)
def test_a_field_that_is_null(family, name):
    """transformers takes null in a few fields; the model is then the one of what its class makes of it. Elsewhere it
    refuses the file, and so do we."""
    config = whole(family) | {name: None}
    try:
        made = CONFIG_MAPPING[family](**{key: value for key, value in config.items() if key != "model_type"})
    except Exception:
        with pytest.raises(ConfigError, match=name):
            architecture(config)
        return
    try:
        found = architecture(config)
    except ConfigError as error:
        assert name in str(error) and name not in NULLABLE[family]
        return
    filled = getattr(made, name)
    # Latent attention does not look at head_dim, which its class makes qk_rope_head_dim; a window off is 0 or null.
    if filled is not None and name != "sliding_window" and not (found.latent and name == "head_dim"):
        assert found == architecture(config | {name: filled})
    else:
        assert name in NULLABLE[family]


def test_measured_differences_by_name():
    """The four that were measured to move logits by 0.30 to 0.80."""
    without = {name: {k: v for k, v in TINY[name].items() if k not in ("n_group", "topk_group")} for name in TINY}
    assert architecture(TINY["glm4_moe"]).rotary_share == 0.5
    assert architecture(TINY["mixtral"]).rope_theta == 1e6
    v3 = without["deepseek_v3"] | {"n_routed_experts": 16, "num_experts_per_tok": 4}
    del v3["routed_scaling_factor"]
    assert (architecture(v3).router_groups, architecture(v3).router_top_groups) == (8, 4)
    assert architecture(v3).router_scaling == 2.5
