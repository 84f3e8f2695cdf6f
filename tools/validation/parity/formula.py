"""The truth: each paper's loss written out, sequence by sequence in fp64, on logits of a model in one process.

Nothing of algorithms/ or ops/ is used, and none of its constants: no packing, no schedule, no data parallelism, no
kernel of ours, gradients by autograd. What is shared with the code under test is Megatron's model at one rank (compared
with transformers' in tests/backend/test_model.py) and the fixture.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.router import TopKRouter

from gspo_megatron.backend.engine.policy import Policy
from gspo_megatron.backend.layers.attention import PackedPlan
from gspo_megatron.backend.model import parameters
from tools.validation.parity.fixture import MAX_RESPONSE, Rollouts

# Rounding in fp32 moves router logits by some 1e-6, and ratios by less than 1e-6.
ROUTING_MARGIN, CLIP_MARGIN = 1e-4, 1e-5


@dataclass(frozen=True)
class Response:
    """The trained tokens of one sequence, t = 1 to |y|; per-token tensors are [|y|] fp64."""

    logp: torch.Tensor  # differentiable
    entropy: torch.Tensor  # differentiable
    old: torch.Tensor
    ref: torch.Tensor
    advantage: float
    token_advantages: torch.Tensor


@dataclass(frozen=True)
class Sizes:
    """Of the whole step."""

    sequences: int  # N, those with a trained token
    tokens: int  # M


@dataclass(frozen=True)
class Truth:
    """What every layout must find."""

    loss: float
    scale: float  # mean |A| over the sequences (tokens) that count; 1 where there are no advantages
    ratios: torch.Tensor  # [N] fp64, exp of the mean log-ratio, 1 where no token is trained
    counts: torch.Tensor  # [N, 3], trained tokens, and those that lost their gradient to the lower and an upper bound
    gradient: dict[str, torch.Tensor]  # by global parameter name, fp64
    clip_margin: float  # distance of the nearest ratio to a clip bound
    routing_margin: float  # least gap between a token's k-th and next best expert, in router logits, over all layers
    old: list[torch.Tensor]  # fp32, one a sequence, of its tokens
    ref: list[torch.Tensor]


def clipped(ratio: torch.Tensor, advantage: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """min(r A, clip(r, 1 - low, 1 + high) A)."""
    return torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def gspo(y: Response, step: Sizes) -> torch.Tensor:
    """Equation 5 of arXiv 2507.18071."""
    s = (y.logp - y.old).mean().exp()
    return -clipped(s, torch.as_tensor(y.advantage), 3e-4, 4e-4) / step.sequences


def gspo_token(y: Response, step: Sizes) -> torch.Tensor:
    """Equations 13 and 14 of arXiv 2507.18071, with advantages that differ by token."""
    s = (y.logp - y.old).mean().exp().detach()
    s_t = s * y.logp.exp() / y.logp.exp().detach()
    return -clipped(s_t, y.token_advantages, 3e-4, 4e-4).mean() / step.sequences


def grpo(y: Response, step: Sizes) -> torch.Tensor:
    """Equations 3 and 4 of arXiv 2402.03300."""
    kl = (y.ref - y.logp).exp() - (y.ref - y.logp) - 1
    objective = clipped((y.logp - y.old).exp(), torch.as_tensor(y.advantage), 0.2, 0.2) - 0.04 * kl
    return -objective.mean() / step.sequences


def dr_grpo(y: Response, step: Sizes) -> torch.Tensor:
    """arXiv 2503.20783: the sum over tokens, divided by a constant."""
    objective = clipped((y.logp - y.old).exp(), torch.as_tensor(y.advantage), 0.2, 0.2)
    return -objective.sum() / (step.sequences * MAX_RESPONSE)


def dapo(y: Response, step: Sizes) -> torch.Tensor:
    """Equation 8 of arXiv 2503.14476."""
    return -clipped((y.logp - y.old).exp(), torch.as_tensor(y.advantage), 0.2, 0.28).sum() / step.tokens


def ppo(y: Response, step: Sizes) -> torch.Tensor:
    """arXiv 1707.06347, equation 7, with the entropy bonus of equation 9."""
    objective = clipped((y.logp - y.old).exp(), y.token_advantages, 0.2, 0.2) + 0.001 * y.entropy
    return -objective.sum() / step.tokens


def dpo(chosen: Response, rejected: Response, pairs: int) -> torch.Tensor:
    """Equation 7 of arXiv 2305.18290, beta 0.1."""
    h = (chosen.logp - chosen.ref).sum() - (rejected.logp - rejected.ref).sum()
    return torch.log1p(torch.exp(-0.1 * h)) / pairs


@dataclass(frozen=True)
class Rule:
    """How an algorithm uses the fixture."""

    loss: Callable
    advantages: str = "group"  # of fixture.packed
    noise: str = "token"  # of fixture.NOISE
    bounds: tuple[float, float] = (0.2, 0.2)
    by_sequence: bool = False  # one ratio a sequence
    uses_ref: bool = False
    pairs: bool = False


RULES = {
    "gspo": Rule(gspo, noise="sequence", bounds=(3e-4, 4e-4), by_sequence=True),
    "gspo_token": Rule(gspo_token, "token", "sequence", (3e-4, 4e-4), by_sequence=True),
    "grpo": Rule(grpo, uses_ref=True),
    "dr_grpo": Rule(dr_grpo, "centred"),
    "dapo": Rule(dapo, bounds=(0.2, 0.28)),
    "ppo": Rule(ppo, "token"),
    "dpo": Rule(dpo, uses_ref=True, pairs=True),
}


def sequence_log_probs(model, token_ids: list[int], temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probs [L], entropy [L]) fp64 of one sequence of L tokens; 0 at its first."""
    tokens = torch.tensor(token_ids)
    plan = PackedPlan.from_cu_seqlens(torch.tensor([0, len(token_ids)], dtype=torch.int32))
    logits = model(tokens[None], torch.arange(len(token_ids))[None], None, packed_seq_params=plan)
    log_softmax = torch.log_softmax(logits[:-1].double() / temperature, -1)
    zero = log_softmax.new_zeros(1)
    logp = torch.cat([zero, log_softmax.gather(1, tokens[1:, None])[:, 0]])
    return logp, torch.cat([zero, -(log_softmax.exp() * log_softmax.clamp(min=-1e4)).sum(-1)])  # p log p = 0 at p = 0


def truth(policy: Policy, items: Rollouts, algorithm: str) -> Truth:
    """Loss, ratios and gradient of `policy`, an fp64 model on one rank. Its gradient buffers are not touched."""
    rule, model = RULES[algorithm], policy.models[0]
    with routing_margins(model) as routing:
        computed = [sequence_log_probs(model, s.token_ids, policy.head.temperature) for s in items.sequences]
    # fp32, as the contract stores them: every layout gets these very numbers.
    old = [(logp.detach() + n).float() for (logp, _), n in zip(computed, items.old_noise[rule.noise], strict=True)]
    ref = [(logp.detach() + n).float() for (logp, _), n in zip(computed, items.ref_noise, strict=True)]
    responses = [_response(items, i, rule, *computed[i], old[i], ref[i]) for i in range(len(computed))]
    trained = [y for y in responses if y.logp.numel()]
    step = Sizes(len(trained), sum(y.logp.numel() for y in trained))
    if rule.pairs:
        pairs = list(zip(responses[::2], responses[1::2], strict=True))
        loss = torch.stack([dpo(chosen, rejected, len(pairs)) for chosen, rejected in pairs]).sum()
    else:
        loss = torch.stack([rule.loss(y, step) for y in trained]).sum()
    named = {p.name: p.local for p in parameters.named(model, policy.topology)}
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    gradient = {
        name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), gradients, strict=True)
    }
    ratios, counts, margin = _ratios(responses, rule)
    return Truth(float(loss.detach()), _scale(trained, rule), ratios, counts, gradient, margin, min(routing), old, ref)


@contextmanager
def routing_margins(model: torch.nn.Module) -> Iterator[list[float]]:
    """The least margin of each forward of each router inside."""
    found: list[float] = []

    def watch(router: TopKRouter, inputs: tuple, output: tuple) -> None:
        logits = F.linear(inputs[0].detach().double(), router.weight.detach().double())
        best = logits.flatten(0, -2).sort(-1, descending=True).values  # [L, E]
        found.append(float((best[:, router.topk - 1] - best[:, router.topk]).min()))

    hooks = [m.register_forward_hook(watch) for m in model.modules() if isinstance(m, TopKRouter)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def check_fixture(found: Truth, rule: Rule) -> None:
    """Raise AssertionError unless rounding in fp32 can change no route and no clip decision, and there are some."""
    assert found.routing_margin > ROUTING_MARGIN, f"a route is decided by {found.routing_margin:.1e}"
    if rule.pairs:
        return
    assert found.clip_margin > CLIP_MARGIN, f"a ratio is {found.clip_margin:.1e} from a clip bound"
    sequences = (found.counts[:, 1:] > 0).sum(0)
    assert sequences.min() >= 2, f"{sequences.tolist()} sequences are clipped below and above; 2 each are wanted"
    assert abs(found.loss) > 1e-3 * found.scale, f"a loss of {found.loss:.1e} hides errors"


def _response(items: Rollouts, i: int, rule: Rule, logp, entropy, old, ref) -> Response:
    sequence = items.sequences[i]
    assert sequence.loss_mask is not None
    mask = torch.tensor([0] * sequence.prompt_length + sequence.loss_mask, dtype=torch.bool)
    number = items.centred[i] if rule.advantages == "centred" else sequence.advantage
    advantage = torch.tensor(number, dtype=torch.float32).double()  # fp32, as batches hold it
    of_tokens = items.token_advantages[i] if rule.advantages == "token" else advantage.expand(mask.numel())
    return Response(
        logp[mask], entropy[mask], old[mask].double(), ref[mask].double(), float(advantage), of_tokens[mask].double()
    )


def _ratios(responses: list[Response], rule: Rule) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Sequence ratios (DPO's: to the reference), counts by sequence, distance of the nearest ratio to a clip bound."""
    ratios, counts, margin = [], [], float("inf")
    for y in responses:
        d = (y.logp - (y.ref if rule.pairs else y.old)).detach()
        s = d.mean().exp() if d.numel() else torch.ones((), dtype=torch.float64)
        ratios.append(s)
        r = s.expand(d.numel()) if rule.by_sequence else d.exp()
        low, high = 1 - rule.bounds[0], 1 + rule.bounds[1]
        if rule.pairs or not d.numel():
            counts.append([d.numel(), 0, 0])
            continue
        below, above = (r < low) & (y.token_advantages < 0), (r > high) & (y.token_advantages > 0)
        counts.append([d.numel(), int(below.sum()), int(above.sum())])
        margin = min(margin, float((r - low).abs().min()), float((r - high).abs().min()))
    return torch.stack(ratios), torch.tensor(counts), margin


def _scale(trained: list[Response], rule: Rule) -> float:
    if rule.pairs:
        return 1.0
    return (
        float(torch.cat([y.token_advantages for y in trained]).abs().mean())
        if rule.advantages == "token"
        else (sum(abs(y.advantage) for y in trained) / len(trained))
    )
