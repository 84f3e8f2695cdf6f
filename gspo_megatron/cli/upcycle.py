"""`gspo-megatron upcycle` makes a Mixture-of-Experts model with copied experts of a dense Hugging Face folder.

torch is imported only after the options have been looked at. The work is done by hf/upcycle.py.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from gspo_megatron.cli.convert import bar
from gspo_megatron.config.constraints import require
from gspo_megatron.config.options import check_options
from gspo_megatron.recipe.model_folders import require_weights

PROGRAM = "gspo-megatron upcycle"


@dataclass(frozen=True)
class Options:
    """Make a Mixture-of-Experts model of a dense one (Llama to Mixtral, Qwen3 to Qwen3-MoE).

    Every expert starts as a copy of the layer's feed-forward, so the new model computes what the old one does."""

    source: tyro.conf.Positional[Path]
    """Folder with config.json and safetensors files of a dense model."""

    target: tyro.conf.Positional[Path]
    """Folder to write; it must not exist, and appears when it is complete."""

    experts: int = 8
    """In each layer."""

    top_k: int = 2
    """Experts that a token gets."""

    noise: float = 0.0
    """Added to each expert's weights, as a share of their standard deviation. 0: the function stays the same."""

    seed: int = 1
    """Of the router's weights, and of the noise."""

    dtype: Literal["same", "fp32", "bf16"] = "same"
    """Type of the weights that are written."""

    max_shard_size: float = 5.0
    """GB (10^9 bytes) of one safetensors file."""


def main(argv: list[str]) -> int:
    """Run the command. Returns the exit status 0.

    Raises:
        ConfigError, ConversionError: what cannot be upcycled; nothing is left behind at the target.
        SystemExit: 0 for --help, 2 for a value of the wrong type.
    """
    options = tyro.cli(Options, prog=PROGRAM, args=argv)
    check(options)
    import torch

    from gspo_megatron.hf.upcycle import upcycle

    dtype = {"same": None, "fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    with bar(Console(stderr=True), options.source.name) as progress:
        upcycle(
            options.source,
            options.target,
            options.experts,
            options.top_k,
            options.noise,
            options.seed,
            dtype,
            progress,
            int(options.max_shard_size * 10**9),
        )
    print(f"done: {options.target}, {options.experts} experts a layer, {options.top_k} a token")
    return 0


def check(options: Options) -> None:
    """Raise ConfigError for options that cannot work."""
    check_options(options, source="SOURCE", target="TARGET")
    require_weights(options.source, "SOURCE")
    require(not options.target.exists(), "TARGET", str(options.target), "exists already", "Give another folder.")
    require(options.seed >= 0, "--seed", options.seed, "must be 0 or more", "Give 1.")
    require(options.experts <= 4096, "--experts", options.experts, "must be at most 4,096", "Give 8.")
    require(options.experts > 1, "--experts", options.experts, "must be above 1", "Give 8.")
    require(
        2 <= options.top_k <= options.experts,
        "--top-k",
        options.top_k,
        f"must be from 2 to --experts {options.experts}: weights of the chosen experts add up to 1, so that of a "
        "single one is always 1 and no gradient reaches the router",
        "Give 2.",
    )
    require(0 <= options.noise < 1, "--noise", options.noise, "must be from 0 to below 1", "Give 0, or 0.01.")
    require(options.max_shard_size > 0, "--max-shard-size", options.max_shard_size, "must be above 0", "Give 5.")
