"""How exact is the sequence ratio? The error of log s against fp64, by how the logits are made and by the model's type.

    python -m tools.validation.ratio_accuracy [--seed 1] [--sequences 64] [--tokens 512]

log s is the mean over a sequence's tokens of log p_new - log p_old. Two tables in one:

- head: two nearby policies, given as bf16 hidden states and LM heads; every row starts from the same ones. Truth is
  fp64 logits from them. Our rows are held to limits: no clip decision changed, at most 1e-6 rms added to log s.
- body: two nearby sets of weights of the example MoE, representable in bf16, as a model in fp64 (truth), fp32 and bf16.
  Nothing is held to a limit here: it is what the model's type costs, whatever the head.

A clip decision: is the ratio below, within or above [1 - 3e-4, 1 + 4e-4]. Exit status: 0 within the limits, 1 not.

Left out: GPUs, rollout engines (their log-probs differ by other kernels), trained weights, tokens sampled from the body
(they are uniform; the head's are sampled from the old policy).
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

LOW, HIGH = 3e-4, 4e-4
CONFIG = Path(__file__).parents[2] / "examples/models/qwen3_moe_tiny/config.json"
CHUNK = 4096  # tokens at a time


@dataclass(frozen=True)
class Row:
    """One way to compute log s, against fp64."""

    part: str  # head or body
    name: str
    rms: float  # of the error of log s over the sequences
    largest: float  # of its absolute value
    changed: int  # clip decisions
    sequences: int
    ours: bool = False  # held to the limits


def decisions(log_ratio: torch.Tensor) -> torch.Tensor:
    """[S] log s -> [S] int: -1 below the clip range, 1 above, 0 inside."""
    ratio = log_ratio.exp()
    return (ratio > 1 + HIGH).int() - (ratio < 1 - LOW).int()


def compare(part: str, name: str, value: torch.Tensor, truth: torch.Tensor, ours: bool = False) -> Row:
    """value and truth: [S] fp64 log s."""
    error = value - truth
    changed = int((decisions(value) != decisions(truth)).sum())
    return Row(part, name, float(error.square().mean().sqrt()), float(error.abs().max()), changed, len(truth), ours)


def verdict(rows: list[Row], max_rms: float) -> list[str]:
    """One sentence for each of our rows beyond a limit."""
    found = []
    for row in rows:
        if row.ours and row.changed:
            found.append(f"{row.name}: {row.changed} of {row.sequences} clip decisions changed; the limit is 0")
        if row.ours and not row.rms <= max_rms:
            found.append(f"{row.name}: {row.rms:.1e} rms added to log s; the limit is {max_rms:.0e}")
    return found


def heads() -> dict[str, tuple[Callable[..., torch.Tensor], bool]]:
    """name -> (fn(hidden [T, H] bf16, weight [V, H] bf16, logits [T, V] fp32, targets [T]) -> log-probs [T], ours)."""
    from megatron.core import parallel_state
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from gspo_megatron.ops.linear_logprobs import linear_logprobs
    from gspo_megatron.ops.vocab_logprobs import vocab_logprobs

    group = parallel_state.get_tensor_model_parallel_group()

    def ours(dtype: torch.dtype):
        return lambda hidden, weight, logits, targets: vocab_logprobs(logits.to(dtype).float(), targets)[0]

    def megatron(dtype: torch.dtype):  # it overwrites fp32 logits
        return lambda hidden, weight, logits, targets: (
            -vocab_parallel_cross_entropy(logits.to(dtype, copy=True).unsqueeze(1), targets.unsqueeze(1)).squeeze(1)
        )

    def fused(dtype: torch.dtype):
        return lambda hidden, weight, logits, targets: (
            -fused_vocab_parallel_cross_entropy(
                logits.to(dtype, copy=True).unsqueeze(1), targets.unsqueeze(1), group
            ).squeeze(1)
        )

    return {
        "ours: linear_logprobs": (
            lambda hidden, weight, logits, targets: linear_logprobs(hidden, weight, targets)[0],
            True,
        ),
        "ours: vocab_logprobs, fp32 logits": (ours(torch.float32), True),
        "vocab_logprobs, logits rounded to fp16": (ours(torch.float16), False),
        "vocab_logprobs, logits rounded to bf16": (ours(torch.bfloat16), False),
        "Megatron cross-entropy, fp32 logits": (megatron(torch.float32), False),
        "Megatron cross-entropy, bf16 logits": (megatron(torch.bfloat16), False),
        "Megatron fused cross-entropy, fp32 logits": (fused(torch.float32), False),
        "Megatron fused cross-entropy, bf16 logits": (fused(torch.bfloat16), False),
    }


def nearby(values: torch.Tensor, step: float, generator: torch.Generator) -> torch.Tensor:
    """`values` with relative noise of `step`, rounded to bf16 (which makes the noise coarse, not smaller)."""
    noise = torch.randn(values.shape, generator=generator, dtype=values.dtype)
    return (values * (1 + step * noise)).bfloat16()


@torch.no_grad()
def head_rows(args: argparse.Namespace) -> tuple[list[Row], torch.Tensor]:
    """(one row a head, the true log s [S])."""
    generator = torch.Generator().manual_seed(args.seed)
    total = args.sequences * args.tokens
    hidden = torch.randn(total, args.hidden, generator=generator).bfloat16()  # as after the final norm
    # Logits of standard deviation 3: the largest of 2048 is about 10, as in a language model.
    weight = (3 / args.hidden**0.5 * torch.randn(args.vocabulary, args.hidden, generator=generator)).bfloat16()
    policies = [
        (hidden, weight),
        (nearby(hidden, args.head_step, generator), nearby(weight, args.head_step, generator)),
    ]
    rules = heads()
    logprobs: dict[str, list[torch.Tensor]] = {name: [] for name in ["truth", *rules]}  # [T] of old, then of new
    targets = torch.empty(total, dtype=torch.int64)
    for number, (states, head) in enumerate(policies):
        parts: dict[str, list[torch.Tensor]] = {name: [] for name in logprobs}
        for start in range(0, total, CHUNK):
            rows = slice(start, start + CHUNK)
            full = torch.log_softmax(states[rows].double() @ head.double().t(), dim=-1)  # [CHUNK, V]
            if number == 0:
                targets[rows] = torch.multinomial(full.exp(), 1, generator=generator).squeeze(1)
            parts["truth"].append(full.gather(1, targets[rows].unsqueeze(1)).squeeze(1))
            logits = states[rows].float() @ head.float().t()
            for name, (fn, _) in rules.items():
                parts[name].append(fn(states[rows], head, logits, targets[rows]))
        for name, values in parts.items():
            logprobs[name].append(torch.cat(values))
    log_ratio = {
        name: (new.double() - old.double()).view(args.sequences, -1).mean(1) for name, (old, new) in logprobs.items()
    }
    truth = log_ratio["truth"]
    return [compare("head", name, log_ratio[name], truth, ours) for name, (_, ours) in rules.items()], truth


def body_batches(args: argparse.Namespace, vocabulary: int) -> list:
    """Packed batches of uniform tokens, `sequences` in all, about CHUNK tokens each."""
    from gspo_megatron.batch import PackedBatch

    generator = torch.Generator().manual_seed(args.seed)
    batches, left = [], args.sequences
    while left:
        size = min(left, max(1, CHUNK // args.tokens))
        left -= size
        positions = torch.arange(args.tokens).repeat(size)
        batches.append(
            PackedBatch(
                tokens=torch.randint(0, vocabulary, (size * args.tokens,), generator=generator),
                position_ids=positions,
                cu_seqlens=torch.arange(0, (size + 1) * args.tokens, args.tokens, dtype=torch.int32),
                num_sequences=size,
                loss_mask=(positions > 0).float(),
                advantages=torch.zeros(size),
            )
        )
    return batches


def body_rows(args: argparse.Namespace, started, cut) -> tuple[list[Row], torch.Tensor]:
    """(rows of the fp32 and the bf16 body, the true log s [S]); our head in all of them."""
    from gspo_megatron.backend.engine.policy import Policy
    from gspo_megatron.backend.model.shape import ModelShape
    from gspo_megatron.config import Layout, TrainConfig

    shape = ModelShape.load(CONFIG, 256)
    shape = dataclasses.replace(shape, hf=shape.hf | {"max_position_embeddings": max(args.tokens, 256)})
    config = TrainConfig(seed=args.seed).resolved(Layout(1, 1, None, 1, 1))
    batches = body_batches(args, shape.vocab_size)
    generator = torch.Generator().manual_seed(args.seed + 1)
    weights: list[list[torch.Tensor]] = []  # of the old policy and of the new one, representable in bf16
    log_ratio = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        policy = Policy(config, shape, cut, started, dtype)
        parameters = [p.data for model in policy.models for p in model.parameters()]
        if not weights:
            # Matrices three times the usual size, so that routing and attention are far from uniform.
            old = [(p * (3 if p.dim() == 2 else 1)).bfloat16() for p in parameters]
            weights = [old, [nearby(w.double(), args.body_step, generator) for w in old]]
        logprobs = []
        for values in weights:
            for parameter, value in zip(parameters, values, strict=True):
                parameter.copy_(value)
            policy.fill_old_log_probs(batches)
            logprobs.append(torch.cat([b.old_logprobs for b in batches]).double().view(args.sequences, -1)[:, 1:])
        log_ratio[dtype] = (logprobs[1] - logprobs[0]).mean(1)
    truth = log_ratio[torch.float64]
    names = {torch.float32: "fp32 body, our head", torch.bfloat16: "bf16 body, our head"}
    return [compare("body", name, log_ratio[dtype], truth) for dtype, name in names.items()], truth


def table(rows: list[Row], truths: dict[str, torch.Tensor]) -> str:
    """The rows as text, each part with the spread of its true log s."""
    lines = [f"{'':<5}{'log s from':<44}{'rms error':>10}{'max error':>11}  decisions changed"]
    for part, truth in truths.items():
        outside = int((decisions(truth) != 0).sum())
        lines.append(
            f"{part}: true log s has rms {float(truth.square().mean().sqrt()):.1e}; {outside} of {len(truth)} "
            "ratios are outside the clip range"
        )
        for row in rows:
            if row.part == part:
                lines.append(
                    f"{'':<5}{row.name:<44}{row.rms:>10.1e}{row.largest:>11.1e}  {row.changed} of {row.sequences}"
                )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    out.add_argument("--seed", type=int, default=1)
    out.add_argument("--sequences", type=int, default=64)
    out.add_argument("--tokens", type=int, default=512, help="of one sequence (default 512)")
    out.add_argument("--hidden", type=int, default=128, help="hidden size of the head's part (default 128)")
    out.add_argument("--vocabulary", type=int, default=2048, help="of the head's part (default 2048)")
    out.add_argument("--head-step", type=float, default=2e-3, help="relative noise between the head's two policies")
    out.add_argument("--body-step", type=float, default=1e-3, help="relative noise between the body's two policies")
    out.add_argument("--max-rms", type=float, default=1e-6, help="limit on what our head adds to log s (default 1e-6)")
    return out


def measure(args: argparse.Namespace) -> tuple[list[Row], dict[str, torch.Tensor]]:
    """(all rows, part -> true log s [S]). Starts a process group of one rank where there is none."""
    from gspo_megatron.backend import cpu_shim

    cpu_shim.install()  # before anything imports megatron
    from gspo_megatron.backend.parallel import runtime, topology
    from gspo_megatron.config import Layout

    started = runtime.init_process_group("cpu")
    cut = topology.initialize_model_parallel(Layout(1, 1, None, 1, 1), args.seed)
    rows, truth = head_rows(args)
    body, body_truth = body_rows(args, started, cut)
    topology.destroy_model_parallel()
    return rows + body, {"head": truth, "body": body_truth}


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    rows, truths = measure(args)
    print(f"seed {args.seed}: {args.sequences} sequences of {args.tokens} tokens, clip range -{LOW:g} / +{HIGH:g}")
    print(table(rows, truths))
    found = verdict(rows, args.max_rms)
    for sentence in found:
        print(f"FAIL {sentence}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    status = main()
    from gspo_megatron.backend.parallel import runtime

    runtime.destroy_process_group()
    sys.exit(status)
