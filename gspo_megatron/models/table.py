"""A family's table made out for one model: what each of Megatron's full tensors is made of.

Left out: which of them a rank holds (backend/model/parameters.py), and multi-token prediction.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate

from gspo_megatron.errors import ConversionError
from gspo_megatron.models.architecture import Architecture
from gspo_megatron.models.families import FAMILIES
from gspo_megatron.models.operators import Piece, Rename, Row

# Old checkpoints hold this table of angles, which follows from the config.
DERIVED = re.compile(r"\.rotary_emb\.inv_freq$")
LAYER = re.compile(r"^model\.layers\.(\d+)\.")
MTP = re.compile(r"^mtp\.")  # Qwen3-Next's name of what other families number as further layers
# Transformer Engine keeps some norms inside the linear layer behind them; pre_mlp_layernorm only in dense layers.
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.in_proj.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_q_up_proj.layer_norm_weight": "self_attention.q_layernorm.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attention.kv_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
MANY = 5  # names shown in a message
LONGEST = 200  # characters of one


@dataclass(frozen=True)
class Entry:
    """One of Megatron's full tensors: merged from pieces, in order."""

    name: str
    operator: Rename
    pieces: tuple[Piece, ...]


def local_name(name: str) -> str:
    """Return a parameter's name as the tables have it, for Transformer Engine's layers too."""
    for fused, plain in FUSED_NORMS.items():
        if name.endswith("." + fused):
            return name.removesuffix(fused) + plain
    return name


def entries(architecture: Architecture, is_stacked: bool = False) -> dict[str, Entry]:
    """List every tensor of the model by Megatron's full name.

    Args:
        is_stacked: experts are in one tensor a layer, as transformers holds them, not one tensor an expert.
    """
    family = FAMILIES[architecture.family]
    moe = family.stacked_moe if is_stacked else family.moe
    experts = family.stacked_experts if is_stacked else family.experts
    found: dict[str, Entry] = {}

    def add(rows: Iterable[Row], layer: int = 0, expert: int = 0) -> None:
        for row in rows:
            if row.when is None or getattr(architecture, row.when):
                name = row.ours.format(layer=layer, expert=expert)
                operator = row.operator.of(architecture)
                found[name] = Entry(name, operator, _pieces(row, operator, layer, expert))

    add(family.model)
    for layer, is_moe in enumerate(architecture.moe_layers):
        add(family.layer, layer)
        add(family.linear if architecture.is_linear(layer) else family.softmax, layer)
        add(moe if is_moe else family.dense, layer)
        for expert in range(architecture.num_experts if is_moe else 0):
            add(experts, layer, expert)
    return found


def _pieces(row: Row, operator: Rename, layer: int, expert: int) -> tuple[Piece, ...]:
    names = [name.format(layer=layer, expert=expert) for name in row.theirs]
    if len(names) > 1:
        return tuple(Piece(name) for name in names)
    whole = Piece(names[0], expert if row.stacked else None, transposed=row.transposed)
    shares = operator.shares
    if len(shares) == 1:
        return (whole,)
    starts = accumulate((0, *shares[:-1]))
    return tuple(
        replace(whole, part=start, parts=sum(shares), count=n) for start, n in zip(starts, shares, strict=True)
    )


def tensors(table: dict[str, Entry]) -> dict[str, list[Piece]]:
    """List Hugging Face's tensors in the table's order, each with the pieces that are taken of it."""
    found: dict[str, list[Piece]] = {}
    for entry in table.values():
        for piece in entry.pieces:
            found.setdefault(piece.tensor, []).append(piece)
    return found


def detect(architecture: Architecture, names: Iterable[str]) -> bool:
    """Return True where a folder with these tensors has its experts stacked."""
    family, names = FAMILIES[architecture.family], set(names)
    layers = [layer for layer, is_moe in enumerate(architecture.moe_layers) if is_moe]
    return any(row.theirs[0].format(layer=layer) in names for row in family.stacked_experts for layer in layers[:1])


def match(architecture: Architecture, names: Iterable[str], drop_mtp: bool, origin: str) -> dict[str, Entry]:
    """Return the table that fits a folder with these tensors: each is taken once, and none is missing.

    Args:
        drop_mtp: leave out the layers behind the model's last one, which predict further tokens.
        origin: the folder, for messages.

    Raises:
        ConversionError: names what is left over or missing.
    """
    names = {name for name in names if not DERIVED.search(name)}
    beyond = {n for n in names if (m := LAYER.match(n)) and int(m.group(1)) >= architecture.num_hidden_layers}
    beyond |= {n for n in names if MTP.match(n)}
    if beyond and not drop_mtp:
        raise ConversionError(
            f"{origin}: {some(beyond)} of layers behind the model's {architecture.num_hidden_layers}, which predict "
            "further tokens (MTP) and are not supported. Turn on drop_mtp to leave them out."
        )
    table = entries(architecture, detect(architecture, names))
    expected = tensors(table).keys()
    if missing := expected - names:
        raise ConversionError(
            f"{origin}: {some(missing)} missing, which a {architecture.family} of this config.json has. "
            "Download the folder again, or correct config.json."
        )
    left_over = names - beyond - expected
    if architecture.tied:
        left_over -= {"lm_head.weight"}  # load.py compares it with the embedding
    if left_over:
        raise ConversionError(
            f"{origin}: {some(left_over)} left over, which a {architecture.family} of this config.json does not have. "
            "Correct config.json, or convert a model without it."
        )
    return table


def _shown(name: str) -> str:
    """A name of somebody's file: no control codes, and no more than a line of it."""
    return name if name.isprintable() and len(name) <= LONGEST else f"{name[:LONGEST]!r}..."


def some(names: Iterable[str]) -> str:
    """Name tensors in a message, cut short: `3 tensors (a, b, c)`."""
    names = sorted(names)
    shown = ", ".join(map(_shown, names[:MANY])) + (", ..." if len(names) > MANY else "")
    return f"{len(names)} tensor{'s' * (len(names) != 1)} ({shown})"
