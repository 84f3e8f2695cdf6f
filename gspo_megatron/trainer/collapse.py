"""A policy or its routing may collapse without an error: the step goes on, and learns nothing. Said when it sets
in, once.

Left out: what to do about it by itself; a collapse of the reward, which the console shows in every line; DPO,
whose steps sample nothing.
"""

from dataclasses import dataclass, field
from typing import Any

from gspo_megatron.config import FaultsConfig
from gspo_megatron.models.architecture import Architecture


@dataclass
class CollapseWatch:
    """Compares each step's metrics with the recipe's limits, and speaks of a limit at the first step beyond it."""

    limits: FaultsConfig
    architecture: Architecture
    told: set[str] = field(default_factory=set)  # metrics whose sentence has been said since this start

    def findings(self, row: dict[str, Any]) -> list[str]:
        """Return a sentence for each metric of the row that has just gone beyond its limit for the first time."""
        checks = {
            "entropy": self._entropy,
            "response/truncated": self._truncated,
            "route/dead_experts": self._dead_experts,
            "route/load_imbalance_max": self._load,
        }
        found = []
        for name, check in checks.items():
            value = row.get(name)
            sentence = None if value is None or name in self.told else check(float(value))
            if sentence is not None:
                self.told.add(name)
                found.append(sentence)
        return found

    def _entropy(self, entropy: float) -> str | None:
        limit = self.limits.min_entropy
        if not entropy < limit:  # not-a-number says nothing here; it is warned about as such
            return None
        return (
            f"entropy is {entropy:.3g} nats, below faults.min_entropy = {limit:g}: the policy is nearly sure of every "
            "token, samples hardly differ, and there is little left to learn from. If the tasks are not solved, lower "
            "optimizer.lr, raise algorithm.clip_ratio_high, or give algorithm.entropy_coef."
        )

    def _truncated(self, share: float) -> str | None:
        limit = self.limits.max_truncated
        if not share > limit:
            return None
        return (
            f"response/truncated is {share:.2f}, above faults.max_truncated = {limit:g}: nearly all responses are cut "
            "at rollout.max_response_length, so most have no end and no answer. Raise it, or give "
            "algorithm.overlong_buffer."
        )

    def _dead_experts(self, number: float) -> str | None:
        limit, model = self.limits.max_dead_experts, self.architecture
        everyone = model.num_experts * sum(model.moe_layers)
        if not number / max(everyone, 1) > limit:
            return None
        return (
            f"route/dead_experts is {number:.0f} of {everyone} (all layers), a share above faults.max_dead_experts = "
            f"{limit:g}: these got no token in the whole step and no longer learn. Lower optimizer.lr, or give "
            "model.moe_aux_loss_coeff; a step of few tokens may leave experts idle too."
        )

    def _load(self, imbalance: float) -> str | None:
        limit, model = self.limits.max_expert_load, self.architecture
        highest = model.num_experts / model.num_experts_per_tok  # one expert of a layer has every token
        share = min(imbalance / highest, 1.0)
        if highest <= 1 or not share > limit:
            return None
        return (
            f"route/load_imbalance_max is {imbalance:.2f} of {highest:g} at most, a share of {share:.3f} above "
            f"faults.max_expert_load = {limit:g}: in some layer nearly every token goes to the same expert. Lower "
            "optimizer.lr, or give model.moe_aux_loss_coeff; route/by_layer/load_imbalance in metrics.jsonl tells "
            "which layer."
        )
