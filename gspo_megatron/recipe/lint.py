"""This warns of what works in a recipe, but is hardly meant. What cannot work is refused in check.py. Nothing here
imports torch."""

import dataclasses

from gspo_megatron.config import AlgorithmConfig, TrainConfig
from gspo_megatron.config.algorithm import SEQUENCE_RATIO

GRPO_EPSILON = 0.01  # clip ranges of token ratios are 0.1 and more, those of sequence ratios 1e-3 and less


def warnings(config: TrainConfig) -> list[str]:
    """Return what works, but is hardly meant; one sentence or two each."""
    found = _unused_by_dpo(config) if config.algorithm.name == "dpo" else _ratio_warnings(config)
    if config.model.moe_aux_loss_coeff > 0:
        found.append(
            f"model.moe_aux_loss_coeff = {config.model.moe_aux_loss_coeff:g} adds a load-balancing gradient that is "
            "no part of the GSPO objective. Leave it at 0 unless that is wanted."
        )
    if config.model.load_hf is not None and config.warm_start.steps:
        found.append(
            f"warm_start.steps = {config.warm_start.steps} trains the weights of model.load_hf on gold answers before "
            "RL. Give 0 unless that is wanted."
        )
    if config.algorithm.shuffle_advantages and config.algorithm.name != "dpo":
        found.append(
            "algorithm.shuffle_advantages makes this a control run: advantages are permuted within groups, so it "
            "cannot learn."
        )
    return found


def _unused_by_dpo(config: TrainConfig) -> list[str]:
    """What is about rollouts and ratios, given in a recipe that has neither; and a temperature, which does count."""
    given, found = config.algorithm.resolved(), []
    plain = AlgorithmConfig(name="dpo", preference=given.preference).resolved()
    unused = [
        field.name for field in dataclasses.fields(plain) if getattr(given, field.name) != getattr(plain, field.name)
    ]
    if unused:
        names = ", ".join(f"algorithm.{name}" for name in unused)
        found.append(f"dpo samples no rollouts and clips no ratio, so it does not use {names}.")
    if config.rollout.temperature != 1:
        found.append(
            f"rollout.temperature = {config.rollout.temperature:g} divides the logits in dpo's log-probs too, the "
            "reference's and the policy's. The DPO paper's is 1."
        )
    return found


def _ratio_warnings(config: TrainConfig) -> list[str]:
    """What would make the ratio another one than the algorithm's paper means."""
    algorithm, found = config.algorithm.resolved(), []
    by_sequence = algorithm.name in SEQUENCE_RATIO
    for name in ("clip_ratio_low", "clip_ratio_high"):
        value = getattr(algorithm, name)
        if by_sequence and value >= GRPO_EPSILON:
            found.append(
                f"algorithm.{name} = {value:g} is a clip range for the token ratios of GRPO; sequence ratios stay "
                "within about 1e-3 of 1, so nothing would be clipped. The GSPO paper uses 3e-4 and 4e-4."
            )
        if not by_sequence and value < GRPO_EPSILON:
            found.append(
                f"algorithm.{name} = {value:g} is a clip range for the sequence ratios of GSPO; the token ratios of "
                f"{algorithm.name} leave it at once, so most tokens would be clipped. 0.2 is common."
            )
    if by_sequence and algorithm.aggregation != "sequence_mean":
        found.append(
            f"algorithm.aggregation = {algorithm.aggregation!r} is not the GSPO paper's: there every sequence counts "
            "the same (sequence_mean)."
        )
    if by_sequence and algorithm.old_logprobs == "rollout":
        found.append(
            "algorithm.old_logprobs = 'rollout' compares log-probs of two engines of different packing, so their "
            "noise is part of a ratio whose clip range is 3e-4. Measure it with gspo-megatron doctor --noise-floor."
        )
        if config.model.params_dtype == "bf16":
            found.append(
                "algorithm.old_logprobs = 'rollout' with model.params_dtype = 'bf16': old log-probs of bf16 accuracy "
                "alone put an error of about 1.5e-4 on the ratio of 64 tokens. Use recomputed: it keeps them in fp32."
            )
    if algorithm.kl.coef and algorithm.kl.place == "loss" and algorithm.kl.estimator == "k1":
        found.append(
            "algorithm.kl.estimator = 'k1' in the loss has a gradient whose mean is 0, so it adds noise and no pull to "
            "the reference. Use k3 or k2 there, or put the KL into the reward (algorithm.kl.place)."
        )
    has_turns = config.rollout.engine == "files" or any(task.environment for task in config.tasks.values())
    if algorithm.advantage_level == "turn" and not has_turns:
        found.append(
            "algorithm.advantage_level = 'turn' compares turns of episodes, and no task has an environment: each "
            "response is one turn, so it is the same as 'sequence'."
        )
    if algorithm.mismatch.correction.startswith("sequence") and algorithm.mismatch.threshold > 1.1:
        found.append(
            f"algorithm.mismatch.threshold = {algorithm.mismatch.threshold:g} bounds the mean log-ratio of a sequence, "
            "which hardly leaves 1 by a hundredth: the correction will not be active. 1.001 is a threshold of its size."
        )
    if config.rollout.top_k or config.rollout.top_p < 1:
        found.append(
            "rollout.top_k and top_p cut the distribution that is sampled from, but log-probs are those of the whole "
            "one: the ratio does not see the cut. Sample from all tokens unless that is wanted."
        )
    return found
