"""Sharded generation: the same samples in every layout, and log-probs that training agrees with."""

import pytest
import torch
import torch.distributed as dist
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from gspo_megatron.backend.layers.attention import CachePlan
from gspo_megatron.batch import Prompt, RolloutGroup, TrainSequence
from gspo_megatron.config import Layout
from gspo_megatron.data.packing import pack
from gspo_megatron.errors import TrainingError
from gspo_megatron.rollout.generation import join_context, request_of
from gspo_megatron.rollout.megatron_engine import MegatronEngine
from gspo_megatron.rollout.sampler import SampleRequest
from gspo_megatron.rollout.sampling import SamplingParams
from gspo_megatron.rollout.stop_strings import StopStrings
from tests.backend.small import SINGLE, TP2_PP2_EP2, VOCAB, in_layouts, small_policy
from tools.validation.ranks import spawn

GROUP, NEW = 3, 12
STOPS = tuple(range(0, VOCAB, 10))


def prompts(count: int = 6) -> list[Prompt]:
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, 14, (count,), generator=generator).tolist()
    return [Prompt(i, None, torch.randint(0, VOCAB, (n,), generator=generator).tolist()) for i, n in enumerate(lengths)]


def generate(layout: Layout, params: SamplingParams) -> dict:
    policy = small_policy(layout)
    cut = policy.topology
    engine = MegatronEngine(policy)
    rows = []  # tokens that each forward pass of a stage computes
    begin = engine.forwards[0].begin

    def counted(plan: CachePlan) -> slice:
        rows.append(plan.num_tokens)
        return begin(plan)

    engine.forwards[0].begin = counted
    everything = prompts()
    share, place = len(everything) // cut.replicas, cut.dp_cp_rank
    mine = everything[place * share : (place + 1) * share]
    answers = engine.sample([request_of(prompt, GROUP, NEW, seed=11) for prompt in mine], params)
    # Training shares each sequence among the context-parallel ranks, so all of them need all of their groups.
    groups = join_context([RolloutGroup(p, list(c)) for p, c in zip(mine, answers, strict=True)], cut)
    sequences = [
        TrainSequence(g.prompt.token_ids + c.token_ids, len(g.prompt.token_ids), rollout_logprobs=c.logprobs)
        for g in groups
        for c in g.completions
    ]
    count = cut.pp_size if cut.vp_size > 1 else 1
    batches = pack(sequences, 4096, cut.microbatch_multiple, count, sequence_multiple=cut.sequence_multiple)
    policy.fill_old_log_probs(batches)
    errors = []
    for batch in [batch for batch in batches if batch.old_logprobs is not None]:
        dist.all_reduce(batch.old_logprobs, group=cut.cp_group)  # each rank has its own tokens', and 0 elsewhere
        errors.append(float(((batch.old_logprobs - batch.rollout_logprobs) * batch.loss_mask).abs().max()))
    return {
        "answers": [[(c.token_ids, c.truncated) for c in group] for group in answers],
        "replica": place,
        "joined": [g.prompt.uid for g in groups],
        "dp_rank": cut.dp_rank,
        "errors": errors,
        "rows": rows,
        "last": cut.is_last_stage,
    }


SAMPLED = SamplingParams(STOPS, temperature=1.0, top_k=100, top_p=0.95)


GREEDY = SamplingParams(STOPS, greedy=True)


# Token i is a letter, its number and another letter, so that two of 25 pairs of neighbours have a string between them.
WORDS = {f"{'abcde'[i % 5]}{i:03d}{'vwxyz'[i % 7 % 5]}": i for i in range(256)}
STRINGS = ("va", "xc")


def by_string() -> SamplingParams:
    """One stop token, and strings that only two tokens together have."""
    words = Tokenizer(WordLevel(WORDS, unk_token="a000v"))
    words.decoder = decoders.Fuse()
    strings = StopStrings(STRINGS, PreTrainedTokenizerFast(tokenizer_object=words))
    return SamplingParams((7,), stop_strings=strings)


def uneven() -> list[SampleRequest]:
    """One to three responses to a prompt, and limits of 1 or 2 tokens for the first replica of two, but one of NEW."""
    requests = []
    for number, prompt in enumerate(prompts()):
        limit = NEW if number == 4 else 1 + number % 2
        requests.append(request_of(prompt, 1 + number % GROUP, limit, seed=11))
    return requests


def generate_uneven(layout: Layout) -> dict:
    policy = small_policy(layout)
    share, place = len(prompts()) // policy.topology.replicas, policy.topology.dp_cp_rank
    engine = MegatronEngine(policy)
    engine.sync(7)
    answers = engine.sample(uneven()[place * share : (place + 1) * share], SAMPLED)
    told = [[(c.token_ids, c.truncated, len(c.logprobs), c.versions) for c in group] for group in answers]
    return {"replica": place, "answers": told}


def one_rank(rank: int, world_size: int) -> tuple[dict, dict, dict]:
    ways = (SAMPLED, GREEDY, by_string())
    return tuple(in_layouts(rank, world_size, {"x": SINGLE}, generate, params)["x"] for params in ways)


@pytest.fixture(scope="module")
def single() -> tuple[dict, dict, dict]:
    return spawn(one_rank, 1)[0]


def test_a_stop_string_ends_a_response_over_the_border_of_tokens(single):
    """It ends there and nowhere else, its tokens stay, and it is not truncated; nor is one whose last token, at the
    limit, completes a string. Each token of a response has one log-prob that training agrees with."""
    names = {i: name for name, i in WORDS.items()}
    ended = {"string": 0, "token": 0, "limit": 0}
    for group in single[2]["answers"]:
        for tokens, truncated in group:
            texts = ["".join(names[t] for t in tokens[:n]) for n in range(1, len(tokens) + 1)]
            by_text = [any(string in text for string in STRINGS) for text in texts]
            assert not any(by_text[:-1]) and 7 not in tokens[:-1]
            assert truncated == (not by_text[-1] and tokens[-1] != 7)
            assert not truncated or len(tokens) == NEW
            ended["string" if by_text[-1] else "limit" if truncated else "token"] += 1
    assert ended["string"] >= 5 and ended["limit"] >= 1
    assert max(single[2]["errors"]) < 2e-5


@pytest.fixture(scope="module")
def reference(single) -> dict:
    return single[0]


def test_finished_sequences_stop_costing(reference):
    """The first pass computes each prompt once (not once a response); pass k computes one token for each response
    longer than k, and the last pass ends the longest."""
    lengths = [len(tokens) for group in reference["answers"] for tokens, _ in group]
    assert min(lengths) < max(lengths)
    expected = [sum(len(p.token_ids) for p in prompts())]
    expected += [sum(length > k for length in lengths) for k in range(1, max(lengths))]
    assert reference["rows"][: len(expected)] == expected
    assert len(reference["rows"]) == len(expected)


def test_completions_end_as_they_say(reference):
    """A stop token is the last token, and only there; without one the response has all NEW tokens and is truncated."""
    for group in reference["answers"]:
        for tokens, truncated in group:
            assert not set(tokens[:-1]) & set(STOPS)
            assert truncated == (tokens[-1] not in STOPS)
            assert not truncated or len(tokens) == NEW


def test_rollout_log_probs_are_the_training_engine_s(reference):
    """Cached decoding and the packed forward are one network: every token's log-prob agrees to fp32 rounding."""
    assert reference["errors"] and max(reference["errors"]) < 2e-5


LAYOUTS = {  # on four ranks
    "TP2xPP2-EP2": TP2_PP2_EP2,
    "PP2xVP2xDP2": Layout(1, 2, 2, 1, 1),
    "TP2xDP2-EP4": Layout(2, 1, None, 4, 1),
    "CP2xTP2-EP4": Layout(2, 1, None, 4, 1, context_parallel_size=2),
    "CP2xPP2": Layout(1, 2, None, 1, 1, context_parallel_size=2),
}


STRING_LAYOUTS = ("TP2xPP2-EP2", "PP2xVP2xDP2")
UNEVEN_LAYOUTS = ("PP2xVP2xDP2", "TP2xDP2-EP4")


def four_ranks(rank: int, world_size: int) -> dict:
    found = in_layouts(rank, world_size, LAYOUTS, generate, SAMPLED)
    some = {name: LAYOUTS[name] for name in STRING_LAYOUTS}
    found |= {"strings": in_layouts(rank, world_size, some, generate, by_string())}
    some = {name: LAYOUTS[name] for name in UNEVEN_LAYOUTS}
    return found | {"uneven": in_layouts(rank, world_size, some, generate_uneven)}


@pytest.fixture(scope="module")
def layouts() -> list[dict]:
    return spawn(four_ranks, 4)


@pytest.mark.parametrize("name", STRING_LAYOUTS)
def test_stop_strings_end_the_same_responses_in_every_layout(single, layouts, name):
    """The last stage reads the text and tells the others which responses have ended."""
    by_replica = {ranks["strings"][name]["replica"]: ranks["strings"][name]["answers"] for ranks in layouts}
    assert [group for rank in sorted(by_replica) for group in by_replica[rank]] == single[2]["answers"]
    assert all(ranks["strings"][name]["answers"] == by_replica[ranks["strings"][name]["replica"]] for ranks in layouts)


@pytest.mark.parametrize("name", LAYOUTS)
def test_same_samples_in_every_layout(reference, layouts, name):
    """Every rank of a replica returns the replica's completions, equal to the one-rank run's token by token. With
    experts over two replicas, the one that ends first must keep serving the other's tokens. Context-parallel ranks are
    replicas here, and join their groups for training."""
    results = [by_layout[name] for by_layout in layouts]
    by_replica = {r["replica"]: r["answers"] for r in results}
    assert all(r["answers"] == by_replica[r["replica"]] for r in results)
    assert [group for rank in sorted(by_replica) for group in by_replica[rank]] == reference["answers"]
    assert max(e for r in results for e in r["errors"]) < 2e-5
    joined = {r["dp_rank"]: r["joined"] for r in results}
    assert all(r["joined"] == joined[r["dp_rank"]] for r in results)
    assert [uid for rank in sorted(joined) for uid in joined[rank]] == list(range(len(prompts())))


@pytest.mark.parametrize("name", UNEVEN_LAYOUTS)
def test_a_response_depends_on_its_own_request_alone(reference, layouts, name):
    """Of the same prompts and seeds: fewer responses to some, and limits that no two replicas have in common. What is
    left is cut where its limit is, and truncated where it had not ended by then. The replica that ends first, after 2
    tokens, goes on serving the experts of the other's up to NEW."""
    by_replica = {ranks["uneven"][name]["replica"]: ranks["uneven"][name]["answers"] for ranks in layouts}
    assert all(ranks["uneven"][name]["answers"] == by_replica[ranks["uneven"][name]["replica"]] for ranks in layouts)
    found = [group for replica in sorted(by_replica) for group in by_replica[replica]]
    for group, request, whole in zip(found, uneven(), reference["answers"], strict=True):
        expected = []
        for tokens, _ in whole[: len(request.seeds)]:
            cut = tokens[: request.max_tokens]
            expected.append((cut, cut[-1] not in STOPS, len(cut), (7,)))
        assert group == expected
    assert len(found[4][0][0]) > 2


def test_greedy_ignores_the_seeds(single):
    """Three rows with different seeds, one answer."""
    for group in single[1]["answers"]:
        assert group[0] == group[1] == group[2]


def broken(rank: int, world_size: int, layout: Layout) -> str:
    """What each rank is told where the model of one replica gives no distribution."""
    policy = small_policy(layout)
    cut = policy.topology
    if cut.is_last_stage and cut.dp_rank == 0:
        with torch.no_grad():
            policy.models[-1].head_weight()[3] = torch.nan
    share = len(prompts()) // cut.replicas
    requests = [request_of(prompt, GROUP, NEW, seed=11) for prompt in prompts()[:share]]
    with pytest.raises(TrainingError) as error:
        MegatronEngine(policy).sample(requests, SAMPLED)
    return str(error.value)


@pytest.mark.parametrize("layout", [Layout(1, 2, None, 1, 1), Layout(1, 1, None, 2, 1)], ids=["PP2", "DP2-EP2"])
def test_a_model_that_gives_no_distribution_ends_generation_on_every_rank(layout):
    """Though only a last stage sees the logits, and the other replica's are fine."""
    told = spawn(broken, 2, layout, timeout=120)
    assert told[0] == told[1] and "(1 nan)" in told[0]
