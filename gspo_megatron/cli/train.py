"""`gspo-megatron train` reads and checks a recipe, starts the ranks, and hands over to what each of them runs."""

import os
import sys

from gspo_megatron.cli.launch import become_ranks, gpu_count, layout_of
from gspo_megatron.process import lifecycle
from gspo_megatron.recipe import check, lint
from gspo_megatron.recipe.load import load_recipe
from gspo_megatron.recipe.output import check_output


def main(argv: list[str]) -> int:
    """Run the command on this rank, or start the ranks. Returns the exit status 0."""
    is_first = lifecycle.rank() == 0
    config = load_recipe(argv, quiet=not is_first)
    layout, world_size = layout_of(config)
    is_one_of_machine = os.environ.get("LOCAL_RANK", "0") == "0"  # each machine must see the folder and the functions
    on_gpus = check.uses_transformer_engine(config, gpu_count() > 0)
    check.check(config, layout, world_size, on_gpus, rewards=is_one_of_machine)
    if is_one_of_machine:
        check_output(config)
    become_ranks(config, world_size)
    if is_first:
        for sentence in lint.warnings(config):
            print(f"warning: {sentence}", file=sys.stderr)
    from gspo_megatron.trainer.train import train

    train(config, layout)
    return 0
