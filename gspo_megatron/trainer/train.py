"""READ FIRST: this is a training run from start to end.

Every rank runs this file. The phases are sft.py (warm start), rl.py (reinforcement learning, one step in the order in
which it happens) and dpo.py, which has no rollouts. What a rank holds is run.py, made by build.py; where a run goes on
is resume.py.
"""

from gspo_megatron.config import Layout, TrainConfig
from gspo_megatron.hf import export
from gspo_megatron.metrics.plots import draw
from gspo_megatron.process.watchdog import Watchdog
from gspo_megatron.trainer import build
from gspo_megatron.trainer.dpo import encode_pairs, train_preferences
from gspo_megatron.trainer.rl import reinforce
from gspo_megatron.trainer.sft import warm_start


def train(config: TrainConfig, layout: Layout) -> None:
    """Run the warm start, then RL or DPO. `layout` has been checked (recipe/check.py)."""
    run = build.build_run(config.resolved(layout))
    watchdog = Watchdog(run.topology.coordinates, config.faults)
    if config.algorithm.name == "dpo":
        pairs = encode_pairs(run)  # before the warm start, because a pair may be too long
        warm_start(run)
        train_preferences(run, pairs)
    else:
        warm_start(run)
        reinforce(run)
    if config.save_hf:
        hf, companions = run.hf_files()
        policy, target = run.policy, run.folder / "hf"
        export.export(policy.models, policy.topology, target, hf, policy.shape.architecture, companions=companions)
    if run.runtime.is_main:
        pictures = draw(run.folder)
        run.reporter.note(f"done: {run.folder} has the checkpoint, metrics.jsonl and {len(pictures)} plots")
    watchdog.stop()
    build.close_run(run)
