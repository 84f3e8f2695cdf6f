"""READ FIRST: this is a training run from start to end.

Every rank runs this file. The phases are sft.py (warm start), rl.py (reinforcement learning, one step in the order in
which it happens) and dpo.py, which has no rollouts. What a rank holds is run.py, made by build.py; which folder a start
takes is folders.py, where a run goes on resume.py, and what follows the last step finish.py.
"""

from gspo_megatron.config import Layout, TrainConfig
from gspo_megatron.process import lifecycle
from gspo_megatron.process.watchdog import Watchdog
from gspo_megatron.trainer import build
from gspo_megatron.trainer.dpo import encode_pairs, train_preferences
from gspo_megatron.trainer.finish import finish
from gspo_megatron.trainer.rl import reinforce
from gspo_megatron.trainer.run import Run
from gspo_megatron.trainer.sft import warm_start


def train(config: TrainConfig, layout: Layout) -> None:
    """Run the warm start, then RL or DPO. `layout` has been checked (recipe/check.py)."""
    try:
        run = build.build_run(config.resolved(layout))
        _phases(run)
    except build.AlreadyFinished as finished:
        if lifecycle.rank() == 0:
            print(finished)
        build.leave_groups()
    except BaseException:
        lifecycle.tidy()
        raise


def _phases(run: Run) -> None:
    watchdog = Watchdog(run.topology.coordinates, run.config.faults)
    if run.config.algorithm.name == "dpo":
        pairs = encode_pairs(run)  # before the warm start, because a pair may be too long
        warm_start(run)
        train_preferences(run, pairs)
    else:
        warm_start(run)
        reinforce(run)
    finish(run)
    watchdog.stop()
    build.close_run(run)
