"""Reads what all families share of attention, embeddings and norms."""

from gspo_megatron.models.config_reader import ConfigReader
from gspo_megatron.models.rope_reader import RopeReader

SILU = ("silu", "swish")  # two names of one function in transformers


def read_attention(config: ConfigReader, scalings: tuple[str, ...] = ("linear", "llama3", "yarn")) -> dict:
    """Return Architecture's arguments.

    Args:
        scalings: of rotary angles, which the family's attention computes.
    """
    heads, hidden = config.size("num_attention_heads"), config.size("hidden_size")
    groups = heads if config.get("num_key_value_heads") is None else config.size("num_key_value_heads")
    config.require(
        heads % groups == 0,
        f"num_attention_heads {heads} is no multiple of {config.said('num_key_value_heads')} {groups}",
        "Correct one of the two.",
    )
    head_dim = config.size("head_dim") if config.get("head_dim") is not None else hidden // heads
    activation = config.get("hidden_act")
    config.require(activation in SILU, f"hidden_act {activation!r} is not supported", f"Use one of: {', '.join(SILU)}.")
    rope = RopeReader(config).read(scalings)
    rotated = int(head_dim * rope.share)
    config.require(
        rotated >= 2 and rotated % 2 == 0,
        f"{rotated} of each head's {head_dim} dimensions are rotated, which are no pairs",
        "Correct head_dim, hidden_size or partial_rotary_factor.",
    )
    return {
        "num_hidden_layers": config.size("num_hidden_layers"),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "vocab_size": config.size("vocab_size"),
        "max_position_embeddings": config.size("max_position_embeddings"),
        "rms_norm_eps": float(config.get("rms_norm_eps")),
        "rope_theta": float(rope.theta),
        "rotary_share": float(rope.share),
        "rope_scaling": rope.scaling,
        "tied": config.get("tie_word_embeddings"),
        "initializer_range": float(config.get("initializer_range")),
    }
