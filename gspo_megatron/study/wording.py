"""The prose of the reports stands here. `say` fills in numbers and joins the lines."""

TEXTS = {
    "summary": """{runs} training runs, up to {seeds} seeds an arm, {hours:.1f} hours of them in all. All runs of a seed
        start from the same weights and see the same prompts; an arm differs in its algorithm, replay and learning rate
        alone. R2 sends every token, in every update, to the experts that the old policy chose, R3 to those that the
        rollout chose (which here is the same engine); free routing pins nothing. Made by `gspo-megatron study
        routing-replay`; the rules and margins (gspo_megatron/study/plan.py) were written before the first run.""",
    "added": """{added} of the runs were planned after the other {first} had been seen, to narrow the intervals for
        GRPO. Written then, too: that every row is read against the margin, that the rows which do not decide share
        their 95%, and that a row whose arms all collapsed shows nothing.""",
    "edge": """A run's outcome is its held-out accuracy, mean over the evaluations after {outcome_from:.0%} of its
        steps; it has collapsed below {collapse:.0%} of the accuracy it started from.""",
    "equivalence": """The paired difference, GSPO free minus GSPO with R2. The same: its 90% interval is within
        ±{margin:g}. Higher or lower: its 95% interval excludes 0. Not shown: neither. The row marked * decides: the
        largest learning rate at which neither arm collapses in any seed. The 95% of the other rows are for all of them
        together.""",
    "superiority": """Read in the same way. The row marked * is at the largest learning rate at which neither arm
        collapses in any seed.""",
    "assay": """GRPO with R2 minus GRPO free, read in the same way; the 95% are for all rows together. If replay helps
        GRPO nowhere, that GSPO needs none says little. A row in which both arms collapsed in every seed shows nothing:
        there is nothing left that replay could have saved, or it did not.""",
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
    "seeds": """Anything finer than these intervals. They are Student's t over seeds, which is the only source of chance
        that is repeated, cut to what accuracies can be. Where some seeds collapse and others do not, outcomes are of
        two kinds and no bell curve, and three or five seeds cannot tell; intervals there are a rough guide. A test that
        assumes nothing (signs of the differences flipped at random) cannot show any difference at 95% with five
        seeds.""",
    "starts": """Runs of one seed did not all start from the same weights: their warm start was repeated on another
        machine.""",
    # The verdict: what GSPO's row that decides shows, what was seen of GRPO (by READINGS), and what both mean.
    "gspo same": """At learning rate {lr:g}, which decides, GSPO did as well here without routing replay as with it.""",
    "gspo more": """At learning rate {lr:g}, which decides, GSPO did better here without routing replay than with
        it.""",
    "gspo less": """At learning rate {lr:g}, which decides, GSPO did worse here without routing replay than with it.
        That contradicts the claim.""",
    "gspo open": """Not shown: whether GSPO does as well here without routing replay. At learning rate {lr:g}, which
        decides, the interval is wider than the margin.""",
    "gspo none": """There is no learning rate at which both GSPO arms are stable, so nothing is shown about replay.""",
    "grpo more": "Replay does help GRPO.",
    "grpo same": """GRPO did as well without it there, too, and no setting was found in which replay helps GRPO.""",
    "grpo less": """Replay harms GRPO there, and no setting was found in which it helps.""",
    "grpo open": """No setting was found in which replay helps GRPO; that it does not help is not shown either, because
        at that learning rate GRPO's interval is wider than the margin.""",
    "grpo floor": """No setting was found in which replay helps GRPO; at that learning rate both its arms collapsed in
        every seed.""",
    "supported": """GSPO did as well without it where replay helps GRPO. That supports the claim, at this scale.""",
    "not there": """But where it does, GSPO is not shown to do as well without, so this does not support the claim
        yet.""",
    "neither": """So replay mattered to neither here, which does not support the claim that GSPO, unlike GRPO, can do
        without it.""",
    "neither seen": """As far as was seen, replay mattered to neither here, which does not support the claim that GSPO,
        unlike GRPO, can do without it.""",
    "no support": "That does not support the claim that GSPO, unlike GRPO, can do without it.",
    "gspo elsewhere": """GSPO free against R2 elsewhere (95% for all of these together): {told}.""",
    "deciding": """GSPO free minus GSPO with R2, held-out accuracy at learning rate {lr:g}: {found} (90% interval,
        {count} seeds); the margin fixed beforehand is {margin:g}.""",
    "stable": "No seed collapsed: {told} (of the learning rates tried).",
    "no common rate": "There is no learning rate at which both GSPO and GRPO are stable without replay.",
    "against grpo": """GSPO free minus GRPO free at learning rate {lr:g}: {found} (95% interval, {count} seeds):
        {verdict}.""",
    "no help": """R2 is not shown to help GRPO in any of {count} settings and learning rates (95% over all of them
        together).""",
    "harm": "R2 is shown to harm GRPO in {where}.",
    "help excluded": """GRPO did as well without R2 as with it, within {margin:g} (90% intervals): {where}.""",
    "help open": """Whether a help to GRPO of more than {margin:g} exists is not shown in these; what their intervals
        still allow is {where}.""",
    "help floor": """Both GRPO arms collapsed in every seed, which shows nothing of replay, in {where}.""",
    # The study of algorithms.
    "algorithms": """{runs} training runs, {hours:.1f} hours of them in all, from the same weights and on the same
        prompts for every algorithm of a seed. Routing is free. Made by `gspo-megatron study algorithms`; the threshold
        of {threshold:g} and the learning rates were written (gspo_megatron/study/plan.py) before the first run.""",
    "reached": """Steps, tokens and seconds to the first evaluation with a held-out accuracy of {threshold:g} or more,
        medians over the seeds that reached it. The row marked * is the algorithm's best learning rate by mean accuracy
        after.""",
    "against": """Accuracy after, GSPO's minus the other's, paired by seed, each at its own best learning rate; 95%
        for all rows together. The best rate was picked by the same outcomes.""",
    "efficiency": """That GSPO needs 30 to 40% less training, or half the time on MoE models, as others report at scale:
        the table above is what came out here.""",
    "order": """To a held-out accuracy of {threshold:g} in all seeds, each at its best learning rate: {told}.""",
    "partly": "Not in all seeds: {told}.",
    "tests": "At the end GSPO is shown better than: {better}; worse than: {worse}.",
    "help": "R2 helped GRPO in {number} of {count} settings and learning rates: {where}.",
}

# What a comparison shows; "more" and "less" are of the first arm.
READINGS = {
    "same": "the same within the margin",
    "more": "higher",
    "less": "lower",
    "open": "not shown",
    "floor": "all collapsed",
}


def say(name: str, **values: object) -> str:
    return " ".join(TEXTS[name].split()).format(**values)
