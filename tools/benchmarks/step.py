"""CPU seconds of one RL step on one core, beside TRL's: `python -m tools.benchmarks.step --trl /path/to/its/python`

Both sides do the same work: Qwen3-MoE of random weights in fp32, GSPO's ratio and clip range, as many tokens, no
response that ends early, rewards that differ within each group. Each side is a process of one thread, and they take
turns; medians are over the steps of all turns. TRL has an environment of its own (step_trl.py), for example

    python -m venv trl && trl/bin/pip install torch==2.13.0 && trl/bin/pip install trl==1.16.0

Left out: more than one rank, and silent groups.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from gspo_megatron.config import Layout
from gspo_megatron.metrics.clock import StepClock
from tools.validation.launching import ROOT
from tools.validation.ranks import spawn

PARTS = ("rollout", "old", "update")


@dataclass(frozen=True)
class Work:
    """One step."""

    num_minibatches: int = 4
    hidden: int = 128
    layers: int = 4
    experts: int = 8
    top_k: int = 2
    heads: int = 4
    vocabulary: int = 512
    sequences: int = 32
    prompt_tokens: int = 16
    new_tokens: int = 32
    group_size: int = 8
    width: int = 128  # of an expert

    @property
    def config(self) -> dict:
        """Return its config.json."""
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": 256,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads // 2,
            "head_dim": self.hidden // self.heads,
            "hidden_act": "silu",
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "moe_intermediate_size": self.width,
            "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "norm_topk_prob": True,
            "tie_word_embeddings": False,
            "initializer_range": 0.02,
        }


WORKS = {
    "tiny, 4 minibatches": Work(),
    "tiny, 1 minibatch": Work(num_minibatches=1),
    "large": Work(hidden=512, layers=8, experts=32, top_k=4, heads=8, sequences=16, prompt_tokens=64, new_tokens=128),
    "V 32768": Work(vocabulary=32768),
}


@dataclass(frozen=True)
class Options:
    """What is measured."""

    works: tuple[str, ...] = tuple(WORKS)
    turns: int = 2
    """Of each side."""
    steps: int = 3
    """In a turn, after one that warms up."""
    trl: Path | None = None
    """The Python of an environment with TRL; None: our side alone."""


class CpuClock(StepClock):
    """A StepClock of this process's CPU seconds."""

    def _now(self) -> float:
        return time.process_time()


def ours(rank: int, world_size: int, work: Work, steps: int, folder: Path) -> list[dict[str, float]]:
    """One turn of our side."""
    import torch

    from gspo_megatron.backend.engine.policy import Policy
    from gspo_megatron.backend.model.shape import ModelShape
    from gspo_megatron.backend.parallel import runtime, topology
    from gspo_megatron.batch import RolloutGroup
    from gspo_megatron.recipe.load import load_recipe
    from gspo_megatron.rollout.megatron_engine import MegatronEngine
    from gspo_megatron.rollout.sampler import SampleRequest
    from gspo_megatron.rollout.sampling import SamplingParams
    from gspo_megatron.trainer.gspo_trainer import GspoTrainer

    torch.set_num_threads(1)
    (folder / "config.json").write_text(json.dumps(work.config))
    changes = {
        "device": "cpu",
        "model.hf-config": str(folder / "config.json"),
        "algorithm.num-minibatches": str(work.num_minibatches),
        "rollout.max-response-length": str(work.new_tokens),
        "max-tokens-per-microbatch": "1000000",
    }
    words = [word for name, value in changes.items() for word in (f"--{name}", value)]
    layout = Layout(1, 1, None, 1, 1)
    config = load_recipe([str(ROOT / "examples/recipes/moe_gspo.yaml"), *words]).resolved(layout)
    started, cut = runtime.init_process_group("cpu"), topology.initialize_model_parallel(layout, config.seed)
    policy = Policy(config, ModelShape.load(folder / "config.json", work.vocabulary), cut, started)
    trainer, engine = GspoTrainer(config, policy=policy), MegatronEngine(policy)
    generator, found = torch.Generator().manual_seed(0), []
    for step in range(steps + 1):
        prompts = torch.randint(
            0, work.vocabulary, (work.sequences // work.group_size, work.prompt_tokens), generator=generator
        ).tolist()
        seeds = tuple(range(step * work.group_size, (step + 1) * work.group_size))
        clock = CpuClock(started.device)
        with clock.part("rollout"):
            requests = [SampleRequest(prompt, seeds, work.new_tokens) for prompt in prompts]
            answers = engine.sample(requests, SamplingParams(()))
        groups = [
            RolloutGroup.of(
                prompt,
                [one.token_ids for one in answer],
                [float(i * 7 % 5) + 0.1 * i for i in range(work.group_size)],
                [one.logprobs or [] for one in answer],
                uid=number,
            )
            for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        ]
        trainer.learn(groups, step + 1, seed=1, clock=clock)
        times = clock.read()
        found.append({"rollout": times["time/rollout"], "old": times["time/old_logprobs"]})
        found[-1]["update"] = times["time/step"] - sum(found[-1].values())
    return found[1:]


def theirs(python: Path, work: Work, steps: int, folder: Path) -> list[dict[str, float]]:
    """One turn of TRL's side."""
    (folder / "work.json").write_text(json.dumps(dataclasses.asdict(work) | {"config": work.config, "steps": steps}))
    script = Path(__file__).with_name("step_trl.py")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(python), "-W", "ignore", str(script), str(folder / "work.json")],
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"error: TRL's side ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"rollout"')]


def medians(rows: list[dict[str, float]]) -> list[float]:
    """Of each part and of the whole."""
    by_part = [statistics.median(row[part] for row in rows) for part in PARTS]
    return [*by_part, statistics.median(sum(row.values()) for row in rows)]


def main(options: Options) -> int:
    """Measure and print the table."""
    titles = ("work", "side", "rollout", "old log-probs", "update", "step", "step, TRL's over ours")
    print(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|")
    for name in options.works:
        work = WORKS[name]
        rows: dict[str, list] = {"ours": [], "TRL": []}
        for _ in range(options.turns):
            with tempfile.TemporaryDirectory() as folder:
                rows["ours"] += spawn(ours, 1, work, options.steps, Path(folder), timeout=3600)[0]
                if options.trl is not None:
                    rows["TRL"] += theirs(options.trl, work, options.steps, Path(folder))
        found = {side: medians(part) for side, part in rows.items() if part}
        ratio = f"{found['TRL'][-1] / found['ours'][-1]:.2f}" if "TRL" in found else "-"
        for side, values in found.items():
            print(
                f"| {name} | {side} | " + " | ".join(f"{value:.3f}" for value in values) + f" | {ratio} |", flush=True
            )
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
