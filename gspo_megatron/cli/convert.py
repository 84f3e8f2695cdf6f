"""`gspo-megatron convert` makes a Megatron checkpoint of a Hugging Face folder, or goes back, on the CPU.

What SOURCE is decides the direction. torch is imported only after the options and the folders have been looked at.
One process, or under torchrun several on one file system, each with a share of the tensors; the first one speaks.
"""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gspo_megatron.config.constraints import require
from gspo_megatron.config.options import check_options
from gspo_megatron.process import lifecycle
from gspo_megatron.recipe.hf_config import read_json
from gspo_megatron.recipe.model_folders import COMPLETE, require_tokenizer, require_weights

PROGRAM = "gspo-megatron convert"
LIMIT = 1e-5  # of the logits' difference, as a share of the largest: fp32's rounding over tens of layers
Direction = Literal["hf_to_megatron", "megatron_to_hf"]


@dataclass(frozen=True)
class Options:
    """Convert a Hugging Face folder to a Megatron checkpoint, or a Megatron checkpoint to a Hugging Face folder."""

    source: tyro.conf.Positional[Path]
    """Folder with config.json and safetensors files, or a Megatron checkpoint (step_NNNNNN of a run)."""

    target: tyro.conf.Positional[Path]
    """Folder to write; it must not exist, and appears when it is complete."""

    dtype: Literal["same", "fp32", "bf16"] = "same"
    """Type of the weights that are written; same: each tensor keeps its own. Router biases stay fp32 in any case."""

    drop_mtp: bool = False
    """To Megatron: leave out layers that predict further tokens (MTP). They are an error otherwise."""

    stacked_experts: bool = False
    """To Hugging Face: one tensor of all experts of a layer, as transformers holds them, not one tensor an expert."""

    hf_config: Path | None = None
    """To Hugging Face: a folder with config.json and tokenizer, for a checkpoint that has none in its folder hf."""

    max_shard_size: float = 5.0
    """To Hugging Face: GB (10^9 bytes) of one safetensors file."""

    verify: tuple[str, ...] = ()
    """Prompts on which the logits of both sides are compared afterwards, in fp32 by transformers and by Megatron."""


def main(argv: list[str], direction: Direction | None = None, program: str = PROGRAM) -> int:
    """Run the command. Returns the exit status 0.

    Args:
        direction: None: what the source is.

    Raises:
        ConfigError, ConversionError: what cannot be converted; nothing is left behind at the target.
        SystemExit: 0 for --help, 2 for a value of the wrong type.
    """
    options = tyro.cli(Options, prog=program, args=argv)
    direction = check(options, direction)
    with suppress(ValueError, OSError):  # a mapped file keeps a descriptor, and a large model has thousands of files
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: Megatron uses any GPU it can see
    import torch

    from gspo_megatron.hf import convert

    dtype = {"same": None, "fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    console, is_first = Console(stderr=True), lifecycle.rank() == 0
    padding = 0
    with bar(console, options.source.name, is_first) as progress:
        if direction == "hf_to_megatron":
            convert.to_megatron(options.source, options.target, dtype, options.drop_mtp, progress)
        else:
            size = int(options.max_shard_size * 10**9)
            padding = convert.to_hugging_face(
                options.source, options.target, dtype, options.stacked_experts, progress, options.hf_config, size
            )
    if not is_first:
        return 0
    if padding:
        print(f"{padding} rows that pad the vocabulary were left out")
    print(f"done: {options.target}")
    if options.verify:
        folders = (options.source, options.target)
        verify(*(folders if direction == "hf_to_megatron" else folders[::-1]), options)
    return 0


def verify(folder: Path, checkpoint: Path, options: Options) -> None:
    """Print how far the logits are apart.

    Args:
        folder: Hugging Face's side.

    Raises:
        ConversionError: farther than rounding explains, where no type was changed.
    """
    from gspo_megatron.errors import ConversionError
    from gspo_megatron.hf.verify import compare

    for found in compare(folder, checkpoint, options.verify):
        print(
            f"logits of {found.prompt!r}, {found.tokens} tokens: differ by at most {found.largest:.1e} (largest "
            f"{found.scale:.1f}), {'the same' if found.same_choices else 'NOT the same'} choices"
        )
        if options.dtype == "same" and found.largest > LIMIT * max(found.scale, 1.0):
            raise ConversionError(
                f"{options.target}: its logits of {found.prompt!r} differ from the source's by "
                f"{found.largest:.1e}, more than rounding explains. Do not use it."
            )


def check(options: Options, direction: Direction | None) -> Direction:
    """Raise ConfigError for options that cannot work; otherwise say which way it goes."""
    check_options(options, source="SOURCE", target="TARGET")
    source = str(options.source)
    is_megatron = (options.source / COMPLETE).is_file()
    if not is_megatron:
        require_weights(options.source, "SOURCE")
    found: Direction = "megatron_to_hf" if is_megatron else "hf_to_megatron"
    wanted = {"hf_to_megatron": "Hugging Face folder", "megatron_to_hf": "Megatron checkpoint"}
    require(
        direction in (None, found),
        "SOURCE",
        source,
        f"is a {wanted[found]}, not a {wanted[direction or found]}",
        "Use the tool for the other way.",
    )
    require(not options.target.exists(), "TARGET", str(options.target), "exists already", "Give another folder.")
    require(options.max_shard_size > 0, "--max-shard-size", options.max_shard_size, "must be above 0", "Give 5.")
    if options.verify:
        _check_verify(options, is_megatron)
    return found


def _check_verify(options: Options, is_megatron: bool) -> None:
    """Raise ConfigError for prompts that could not be compared, before hours go into the conversion."""
    if is_megatron:
        require_tokenizer(options.hf_config or options.source / "hf", "--hf-config" if options.hf_config else "SOURCE")
        return
    require_tokenizer(options.source, "SOURCE")
    told = read_json(options.source / "config.json", "SOURCE").get("quantization_config")
    method = told.get("quant_method") if isinstance(told, dict) else told
    require(
        told is None,
        "--verify",
        options.verify,
        f"the weights of SOURCE are quantised ({method}), and transformers does not run those on a CPU",
        "Leave it out here, and give it where the checkpoint is converted back, which writes bf16.",
    )


@contextmanager
def bar(console: Console, name: str, is_first: bool = True) -> Iterator:
    """Show a progress bar on a terminal, nothing elsewhere; of several ranks the first one's share."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (console.is_terminal and is_first)) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
