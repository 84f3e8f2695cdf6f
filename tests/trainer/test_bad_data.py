"""Numbers that no training may swallow, on one rank of two: every rank raises the same error, naming the field and the
first bad place, none hangs, and the weights stay. Batches without a gradient are no error, and change nothing.

Left out: what a single process can see of check_batch and pack (tests/data).
"""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch

from gspo_megatron.algorithms import policy_loss
from gspo_megatron.backend.engine import microbatches as packing
from gspo_megatron.backend.engine.microbatches import global_counts
from gspo_megatron.backend.engine.policy import Policy
from gspo_megatron.backend.model import parameters
from gspo_megatron.backend.parallel import topology
from gspo_megatron.batch import (
    Completion,
    Minibatch,
    PackedBatch,
    Prompt,
    Response,
    RolloutGroup,
    Score,
    TaskItem,
    TrainSequence,
)
from gspo_megatron.config import AlgorithmConfig, FaultsConfig, Layout
from gspo_megatron.config.algorithm import ALGORITHMS, GROUP_NORMALISED
from gspo_megatron.data.packing import pack
from gspo_megatron.data.validate import check_batch
from gspo_megatron.errors import ConfigError, GspoError
from gspo_megatron.recipe.load import load_recipe
from gspo_megatron.rollout.scoring import score
from gspo_megatron.trainer import sanity_checks
from tests.backend.small import VOCAB, small_policy
from tools.validation.ranks import spawn

LAYOUTS = {"DP2": Layout(1, 1, None, 1, 1), "PP2": Layout(1, 2, None, 1, 1)}
NAN, INF = math.nan, math.inf
PROMPT, LENGTHS = 3, (9, 5, 12, 7)  # of this replica's sequences, prompt included
BAD_PLACE = 17  # the first trained token of the third sequence, which begins at 14


def sequences(dp_rank: int) -> list[TrainSequence]:
    generator = torch.Generator().manual_seed(dp_rank)
    return [
        TrainSequence(
            torch.randint(0, VOCAB, (length,), generator=generator).tolist(),
            PROMPT,
            advantage=float((-1) ** i),
            rollout_logprobs=[-1.0] * (length - PROMPT),
        )
        for i, length in enumerate(LENGTHS)
    ]


def replace_item(name: str, index: int, value: float) -> Callable[[PackedBatch], None]:
    def change(batch: PackedBatch) -> None:
        changed = getattr(batch, name).clone()
        changed[index] = value
        setattr(batch, name, changed)

    return change


def cut(name: str) -> Callable[[PackedBatch], None]:
    return lambda batch: setattr(batch, name, getattr(batch, name)[:-1])


def nothing_left(batch: PackedBatch) -> None:
    batch.num_sequences = 0


# What the packer could have made: the change, and what the message must say.
MALFORMED = {
    "rollout log-probs nan": (replace_item("rollout_logprobs", BAD_PLACE, NAN), "rollout_logprobs[17] = nan"),
    "rollout log-probs -inf": (replace_item("rollout_logprobs", BAD_PLACE, -INF), "rollout_logprobs[17] = -inf"),
    "rewards": (replace_item("rewards", 2, NAN), "rewards[2] = nan"),
    "advantages": (replace_item("advantages", 1, INF), "advantages[1] = inf"),
    "half a mask": (replace_item("loss_mask", BAD_PLACE, 0.5), "loss_mask[17] = 0.5: must be 0 or 1"),
    "mask nan": (replace_item("loss_mask", BAD_PLACE, NAN), "loss_mask[17] = nan"),
    "mask of a first token": (replace_item("loss_mask", 14, 1.0), "loss_mask[14] = 1: is a sequence's first token"),
    "not monotone": (replace_item("cu_seqlens", 2, 9), "cu_seqlens[2] = 9: must be above cu_seqlens[1] = 9"),
    "not all tokens": (replace_item("cu_seqlens", 4, 30), "cu_seqlens[4] = 30: must be the 33 tokens"),
    "empty": (nothing_left, "num_sequences = 0: with 33 tokens: a batch must not be empty"),
    "short mask": (cut("loss_mask"), "loss_mask = [32]: must have shape [33]"),
    "short rewards": (cut("rewards"), "rewards = [3]: must have shape [4]"),
    "short advantages": (cut("advantages"), "advantages = [3]"),
}


def far_away(batch: PackedBatch) -> None:
    """Old log-probs of the sequence whose advantage is negative, so that nothing clips its ratio of exp(994 or so)."""
    batch.advantages = -torch.ones_like(batch.advantages)
    batch.old_logprobs = torch.where(batch.loss_mask > 0, -1000.0, 0.0)


# What is found in the update: log-probs that arrive after packing, advantages from rewards.
POISONED = {
    "old nan": (replace_item("old_logprobs", BAD_PLACE, NAN), "old_logprobs[17] = nan, token 3 of sequence 2"),
    "old inf": (replace_item("old_logprobs", BAD_PLACE + 1, INF), "old_logprobs[18] = inf, token 4 of sequence 2"),
    "old -inf": (replace_item("old_logprobs", BAD_PLACE + 1, -INF), "old_logprobs[18] = -inf, token 4 of sequence 2"),
    "advantages nan": (replace_item("advantages", 3, NAN), "advantages[3] = nan must be finite"),
    "advantages inf": (replace_item("advantages", 3, -INF), "advantages[3] = -inf must be finite"),
    "ratio": (far_away, "logprobs["),
}


def message(call: Callable, *args) -> str:
    """The error's text; whatever is not ours fails the rank."""
    try:
        call(*args)
    except GspoError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def state(policy: Policy) -> list[torch.Tensor]:
    """Weights, and all that an optimizer step may move."""
    found = [p.detach().clone() for model in policy.models for p in model.parameters()]
    for part in policy.optimizer.chained_optimizers:
        for values in part.optimizer.state.values():
            found += [v.clone() for v in values.values() if isinstance(v, torch.Tensor)]
        found.append(torch.tensor([group["lr"] for group in part.param_groups]))
    return [*found, torch.tensor(policy.network.schedule.num_steps)]


def same(before: list[torch.Tensor], after: list[torch.Tensor]) -> bool:
    return len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def everywhere(rank: int, world_size: int) -> dict:
    results = {}
    for name, layout in LAYOUTS.items():
        policy = small_policy(layout, faults=FaultsConfig(max_skipped_updates=len(POISONED) - 1))
        # Bad data comes up in the last data-parallel replica, or in the last stage: never on rank 0.
        cut, mine = policy.topology, sequences(policy.topology.dp_rank)
        is_bad = cut.dp_rank == cut.dp_size - 1
        results[name] = {
            "malformed": {case: malformed(policy, mine, change, is_bad) for case, (change, _) in MALFORMED.items()},
            "none": message(packing.microbatches, [] if is_bad else mine, 64, cut, policy.device),
            "mismatch": message(packing.microbatches, shortened(mine) if is_bad else mine, 64, cut, policy.device),
            "score": {case: message(scored, policy, case, is_bad) for case in SCORERS},
            **updates(policy, mine, is_bad),
            "health": warned(policy, mine),
        }
        topology.destroy_model_parallel()
    return results


def malformed(policy: Policy, mine: list[TrainSequence], change: Callable, is_bad: bool) -> str:
    """Through `microbatches`, with a packer that spoils what it made on one replica."""

    def spoil(*args, **kwargs) -> list[PackedBatch]:
        made = pack(*args, **kwargs)
        if is_bad:
            change(made[0])
        return made

    packing.pack = spoil
    try:
        return message(packing.microbatches, mine, 64, policy.topology, policy.device)
    finally:
        packing.pack = pack


def shortened(mine: list[TrainSequence]) -> list[TrainSequence]:
    return [
        dataclasses.replace(s, rollout_logprobs=s.rollout_logprobs[: 4 if i == 2 else None]) for i, s in enumerate(mine)
    ]


def updates(policy: Policy, mine: list[TrainSequence], is_bad: bool) -> dict:
    """Refused updates, and updates without a gradient, after one that did change the weights."""
    loss = policy_loss(AlgorithmConfig())

    def attempt(change: Callable | None) -> tuple[str, bool, bool | None]:
        batches = packing.microbatches(mine, 64, policy.topology, policy.device)
        policy.fill_old_log_probs(batches)
        for batch in batches:
            if change and batch.old_logprobs is not None:
                change(batch)
            elif change and change in CHANGES_WITHOUT_OLD:
                change(batch)
        before, results = state(policy), []
        counts = global_counts(batches, policy.topology)
        text = message(lambda: results.append(policy.update(batches, loss, counts)))
        if results and results[0].not_finite:
            text = results[0].not_finite
        return text, same(before, state(policy)), results[0].stepped if results else None

    results = {
        "plain": attempt(None),
        "poisoned": {case: attempt(change if is_bad else None) for case, (change, _) in POISONED.items()},
        "no advantage": attempt(without_advantage),
        "no token": attempt(without_tokens),
        "again": attempt(None),
    }
    full = parameters.gather_full(policy.models, policy.topology)
    return results | {
        "weights": {name: float(weight.double().sum()) for name, weight in full.items()},
    }


def without_advantage(batch: PackedBatch) -> None:
    batch.advantages = torch.zeros_like(batch.advantages)


def without_tokens(batch: PackedBatch) -> None:
    batch.loss_mask = torch.zeros_like(batch.loss_mask)


CHANGES_WITHOUT_OLD = (without_advantage, without_tokens)  # of what every stage holds


class Scorer:
    """Stands in for TaskMixture.score_all: fails at the response "worse"."""

    def __init__(self, failure: object):
        self.failure = failure

    def score_all(self, responses: list[Response], told: Callable[[int], None]) -> list[Score]:
        if isinstance(self.failure, Exception) and any(response.text == "worse" for response in responses):
            raise self.failure
        return [Score(self.failure if response.text == "worse" else 1.0) for response in responses]


SCORERS = {
    "nan": (NAN, "the reward is nan and must be finite"),
    "inf": (INF, "the reward is inf and must be finite"),
    "ours": (ConfigError("tasks.x: no"), "tasks.x: no"),
    "foreign": (KeyError("entry"), "the scorer raised KeyError: 'entry'"),
}


def scored(policy: Policy, case: str, is_bad: bool) -> None:
    """Two groups of two responses on each replica; the third response of one replica cannot be scored."""
    groups = [
        RolloutGroup(Prompt(7 + i, TaskItem("x", "?", "", {}), [1]), [Completion([1], [0.0], False)] * 2, texts=texts)
        for i, texts in enumerate((["good", "good"], ["worse" if is_bad else "good", "good"]))
    ]
    score(groups, Scorer(SCORERS[case][0]), policy.topology, policy.device)


def warned(policy: Policy, mine: list[TrainSequence]) -> dict:
    """The start-up warnings, as train.py asks for them."""
    longer = [dataclasses.replace(s, token_ids=s.token_ids * 5, rollout_logprobs=None) for s in mine]

    def found(change: Callable) -> list[str]:
        batches = packing.microbatches(longer, 400, policy.topology, policy.device)
        policy.fill_old_log_probs(batches)
        for batch in batches:
            change(batch)
        return sanity_checks.findings(policy, [Minibatch(list(range(len(longer))), batches)], longer)

    def round_old(batch: PackedBatch) -> None:
        if batch.old_logprobs is not None:
            batch.old_logprobs = batch.old_logprobs.bfloat16().float()

    def round_all_but_one(batch: PackedBatch) -> None:
        round_old(batch)
        if batch.old_logprobs is not None:
            batch.old_logprobs[20] = -1.0001

    def forget(batch: PackedBatch) -> None:
        batch.old_logprobs = None

    changes = {
        "healthy": lambda batch: None,
        "bf16": round_old,
        "one fp32": round_all_but_one,
        "none": forget,
        "mask": replace_item("loss_mask", 50, 0.0),
    }
    return {name: found(change) for name, change in changes.items()}


@pytest.fixture(scope="module")
def ranks() -> list[dict]:
    return spawn(everywhere, 2)


@pytest.fixture(params=LAYOUTS)
def both(request, ranks) -> tuple[dict, dict]:
    return tuple(rank[request.param] for rank in ranks)


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_batch_is_refused_by_every_rank_alike(both, case):
    assert both[0]["malformed"][case] == both[1]["malformed"][case]
    assert both[0]["malformed"][case].startswith("RolloutError: " + MALFORMED[case][1])


def test_sequences_that_do_not_fit_together(both):
    assert both[0]["none"] == both[1]["none"] and "there is no sequence to pack" in both[0]["none"]
    assert both[0]["mismatch"] == both[1]["mismatch"]
    assert both[0]["mismatch"].startswith("RolloutError: sequence 2: 4 rollout_logprobs for 9 response tokens")


@pytest.mark.parametrize("case", POISONED)
def test_a_poisoned_update_is_skipped_and_changes_nothing(both, case):
    """By every rank alike; weights, moments and learning rate are the same bits as before. One is let pass less than
    there are, so the last one stops the run."""
    assert both[0]["poisoned"][case] == both[1]["poisoned"][case]
    text, unchanged, stepped = both[0]["poisoned"][case]
    reason = "rank 1, microbatch 0 of 1: " + POISONED[case][1]
    if case == list(POISONED)[-1]:
        assert text.startswith(
            "TrainingError: 6 updates of the policy in a row were skipped "
            "(faults.max_skipped_updates = 5). The last: " + reason
        )
        assert "the ratio exp(99" in text and stepped is None
    else:
        assert text.startswith(reason) and stepped is False
    assert unchanged


@pytest.mark.parametrize("case", ["no advantage", "no token"])
def test_an_update_without_a_gradient_changes_nothing_and_says_so(both, case):
    assert all(rank[case] == ("no error", True, False) for rank in both)


def test_updates_before_and_after_do_learn(both):
    """So that "unchanged" above means something, and nothing that was refused left its mark."""
    for rank in both:
        assert rank["plain"] == rank["again"] == ("no error", False, True)
    assert all(math.isfinite(total) for total in both[0]["weights"].values())
    assert both[0]["weights"] == both[1]["weights"]


@pytest.mark.parametrize("case", SCORERS)
def test_a_scorer_that_fails_on_one_rank_fails_on_all(both, case):
    assert both[0]["score"][case] == both[1]["score"][case]
    named = "response 0 to prompt 8 (x), 'worse': " if case in ("nan", "inf") else ""
    assert both[0]["score"][case].startswith(f"RolloutError: {named}{SCORERS[case][1]}")


def test_start_up_warnings(both):
    """Found on the last stage, known on both."""
    assert both[0]["health"] == both[1]["health"]
    found = both[0]["health"]
    assert found["healthy"] == found["one fp32"] == found["none"] == []
    assert len(found["bf16"]) == 1 and "is a bf16 number" in found["bf16"][0]
    assert len(found["mask"]) == 1 and "response 1 has 22 tokens, of which 21 are trained" in found["mask"][0]


def test_few_numbers_may_all_be_bf16_by_chance():
    batch = pack([TrainSequence([1] * (sanity_checks.ENOUGH + 1), 1)], 100, 1)[0]
    batch.old_logprobs = torch.full((sanity_checks.ENOUGH + 1,), -1.5)
    assert sanity_checks.is_stored_in_bf16([batch])
    batch.old_logprobs[5] = 0.0
    assert not sanity_checks.is_stored_in_bf16([batch])


@pytest.mark.parametrize("change", MALFORMED)
def test_check_batch_itself(change):
    """In one process, where no agreement can hide what it does."""
    batch = pack(sequences(0), 64, 1)[0]
    check_batch(batch)
    MALFORMED[change][0](batch)
    assert MALFORMED[change][1] in message(check_batch, batch)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_group_of_one_is_refused_where_groups_are_compared(name):
    argv = ["--algorithm.name", name, "--rollout.group-size", "1"]
    if name in GROUP_NORMALISED:
        with pytest.raises(ConfigError, match=f"rollout.group_size = 1: {name} compares the responses"):
            load_recipe(argv)
    else:
        assert name in ("ppo", "dpo")
        assert load_recipe(argv).rollout.group_size == 1
