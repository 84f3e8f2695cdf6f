"""The prose of the reports. `say` fills in numbers and joins the lines."""

TEXTS = {
    "summary": """{runs} training runs, up to {seeds} seeds an arm, {hours:.1f} hours of them in all. All runs of a seed
        start from the same weights and see the same prompts; an arm differs in its algorithm, replay and learning rate
        alone. R2 sends every token, in every update, to the experts that the old policy chose, R3 to those that the
        rollout chose (which here is the same engine); free routing pins nothing. Made by `gspo-megatron study
        routing-replay`; the rules and margins (gspo_megatron/study/plan.py) were written before the first run.""",
    "edge": """A run's outcome is its held-out accuracy, mean over the evaluations after {outcome_from:.0%} of its
        steps; it has collapsed below {collapse:.0%} of the accuracy it started from.""",
    "equivalence": """90% intervals of the paired difference, GSPO free minus GSPO with R2. Equivalent: within
        ±{margin:g}. The row marked * decides: the largest learning rate at which neither arm collapses in any seed.""",
    "superiority": """95% intervals. The row marked * is at the largest learning rate at which neither arm collapses in
        any seed.""",
    "assay": """Intervals of GRPO with R2 minus GRPO free, 95% for all rows together. If replay helps GRPO nowhere, that
        GSPO needs none says little.""",
    "others": "Settings: {settings}. Four ranks are PP2 x EP2 x DP2.",
    "minibatches": """Most updates a rollout batch without a collapse in any seed, at learning rate {lr:g} (4, 8, 16
        tried): {told}.""",
    "layouts": """The same run in another layout differs by rounding, which training amplifies; the difference should be
        of the size of that between seeds.""",
    "routing": """Shares of activated experts that one update changes (the paper reports about 10% for a 48-layer
        model); of (token, layer) pairs in which the set of experts changed, over all updates after a batch's first, in
        sequences that the clip removed and in others; and the correlation over sequences of that share with |log s|.
        With R2 these are the routes that the routers would have chosen.""",
    "spread": """Standard deviations over sequences of log s after a batch's last update: of the whole, of what changed
        weights do along the old routes, and of what changed routes add. Every token's log-ratio is the sum of the two.
        The noise floor is the rms of log s at unchanged weights.""",
    "cost": """Time of a batch's updates with R2 over that without (median over pairs of runs that lived): {told}.
        Memory: 2 bytes for each token, layer and chosen expert of a rollout batch, on the rank that routes it; with the
        statistics on, free routing keeps the same.""",
    "scale": """Scale. These are models of about a million parameters on short responses, trained for minutes. The
        paper's claim is about models of 30 billion and more with 48 layers, whose routes change more and whose
        responses are a hundred times longer.""",
    "engines": """bf16 and a separate rollout engine. Training and sampling are one engine in fp32 here, so the mismatch
        between engines, which R3 (replay of the rollout engine's routes) is made against, is next to nothing.""",
    "starts": """Runs of one seed did not all start from the same weights: their warm start was repeated on another
        machine.""",
    # Verdicts: what the deciding interval says about GSPO, and whether replay was seen to help GRPO.
    "same helps": """Here GSPO did as well without routing replay as with it, where replay does help GRPO. That supports
        the claim, at this scale.""",
    "same": """Here GSPO did as well without routing replay as with it. But replay mattered to neither: no setting was
        found in which it helps GRPO, so this does not support the claim that GSPO, unlike GRPO, can do without it.""",
    "worse helps": """Here GSPO did worse without routing replay than with it. That contradicts the claim.""",
    "worse": """Here GSPO did worse without routing replay than with it. That contradicts the claim.""",
    "better helps": "Here GSPO did better without routing replay than with it, where replay does help GRPO.",
    "better": """Here GSPO did better without routing replay than with it; replay was not seen to help GRPO either.""",
    "open helps": """Not shown: whether GSPO does as well without routing replay. The interval is wider than the
        margin.""",
    "open": """Not shown: whether GSPO does as well without routing replay. The interval is wider than the margin. Nor
        was a setting found in which replay helps GRPO.""",
    "none helps": """There is no learning rate at which both GSPO arms are stable, so nothing is shown about replay.""",
    "none": """There is no learning rate at which both GSPO arms are stable, so nothing is shown about replay.""",
    "deciding": """GSPO free minus GSPO with R2, held-out accuracy at learning rate {lr:g}: {found} (90% interval,
        {count} seeds); the margin fixed beforehand is {margin:g}.""",
    "stable": "No seed collapsed: {told} (of the learning rates tried).",
    "no common rate": "There is no learning rate at which both GSPO and GRPO are stable without replay.",
    "against grpo": """GSPO free minus GRPO free at learning rate {lr:g}: {found} (95% interval, {count} seeds):
        {verdict}.""",
    "no help": """R2 was not seen to help GRPO in any of {count} settings and learning rates (95% over all of them
        together).""",
    # The study of algorithms.
    "algorithms": """{runs} training runs, {hours:.1f} hours of them in all, from the same weights and on the same
        prompts for every algorithm of a seed. Routing is free. Made by `gspo-megatron study algorithms`; the threshold
        of {threshold:g} and the learning rates were written (gspo_megatron/study/plan.py) before the first run.""",
    "reached": """Steps, tokens and seconds to the first evaluation with a held-out accuracy of {threshold:g} or more,
        medians over the seeds that reached it. The row marked * is the algorithm's best learning rate by mean accuracy
        after.""",
    "against": """Accuracy after, GSPO's minus the other's, paired by seed, each at its own best learning rate; 95%
        intervals.""",
    "efficiency": """That GSPO needs 30 to 40% less training, or half the time on MoE models, as others report at scale:
        the table above is what came out here.""",
    "order": """To a held-out accuracy of {threshold:g} in all seeds, each at its best learning rate: {told}.""",
    "partly": "Not in all seeds: {told}.",
    "tests": "At the end GSPO is shown better than: {better}; worse than: {worse}.",
    "help": "R2 helped GRPO in {number} of {count} settings and learning rates: {where}.",
}


def say(name: str, **values: object) -> str:
    return " ".join(TEXTS[name].split()).format(**values)
