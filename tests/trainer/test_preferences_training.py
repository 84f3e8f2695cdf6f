"""DPO on real ranks: it learns what was preferred, in every layout, and says so in its rows and charts."""

import dataclasses
import json
import math
import random
import string
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gspo_megatron.algorithms import policy_loss
from gspo_megatron.backend.engine.reference import FrozenReference
from gspo_megatron.backend.parallel import topology
from gspo_megatron.batch import TrainSequence
from gspo_megatron.config import (
    AlgorithmConfig,
    DataConfig,
    Layout,
    OptimizerConfig,
    PreferenceConfig,
    TrainConfig,
    WarmStartConfig,
)
from gspo_megatron.data.epochs import share_of
from gspo_megatron.data.packing import pack
from gspo_megatron.errors import GspoError, RolloutError
from gspo_megatron.metrics.learning import summarise
from gspo_megatron.metrics.plots import draw
from gspo_megatron.metrics.record import load_record
from gspo_megatron.tasks.preferences import PreferencePair
from gspo_megatron.trainer import build, dpo, train
from gspo_megatron.trainer import run as runs
from gspo_megatron.trainer.dpo import EncodedPair, check_length, encode_pair, pair_metrics
from tests.backend.small import CONFIG_PATH
from tests.data.templates import CHATML, tokenizer
from tools.validation.ranks import spawn

LAYOUTS = {
    "DP2": Layout(1, 1, None, 1, 1), "PP2xVP2": Layout(1, 2, 2, 1, 1),
    "CP2": Layout(1, 1, None, 1, 1, context_parallel_size=2),
}  # fmt: skip
PAIRS, HELD_OUT, STEPS = 77, 7, 11  # the last tenth; odd, so that two replicas need a filler


def write_pairs(folder: Path) -> Path:
    """Chosen answers are written in the first half of the alphabet, rejected ones in the second, lengths vary."""
    generator = random.Random(5)
    letters = string.ascii_lowercase

    def word(alphabet: str) -> str:
        return "".join(generator.choices(alphabet, k=generator.randint(2, 9)))

    rows = [
        {"prompt": word(letters), "chosen": word(letters[:13]), "rejected": word(letters[13:])} for _ in range(PAIRS)
    ]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def configured(path: Path, layout: Layout) -> TrainConfig:
    """From random weights; a microbatch holds a few pairs, so a step has several on each rank."""
    algorithm = AlgorithmConfig("dpo", preference=PreferenceConfig(path, batch_size=16)).resolved()
    model = dataclasses.replace(TrainConfig().model, hf_config=CONFIG_PATH)
    return TrainConfig(
        output_dir=path.parent,
        steps=STEPS,
        eval_interval=5,
        max_tokens_per_microbatch=200,
        device="cpu",
        model=model,
        data=DataConfig(num_eval_prompts=8),
        warm_start=WarmStartConfig(steps=0),
        algorithm=algorithm,
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=2),
    ).resolved(layout)


def in_layouts(rank: int, world_size: int, path: Path) -> dict:
    found = {}
    for name, layout in LAYOUTS.items():
        run = build.build_run(configured(path, layout))
        found[name] = packed(run) | {"moved": evaluation_at_moved_weights(run), "folder": run.folder}
        dpo.train_preferences(run, dpo.encode_pairs(run))
        found[name] |= {"normalised": length_normalised(run)}
        run.reporter.close()
        topology.destroy_model_parallel()
    return found


def packed(run: runs.Run) -> dict:
    """What this rank's replica packs of a batch of 16 pairs whose tokens name pair and side."""
    pairs = [
        EncodedPair(*(TrainSequence([1, 2 * p, 2 * p + side] + [3] * (p + 5 * side), 1) for side in (0, 1)))
        for p in range(16)
    ]
    mine = share_of(pairs, run.topology.dp_rank, run.topology.dp_size)
    batches = run.policy.microbatches(dpo.flat(mine), unit=2)
    starts = [batch.cu_seqlens[: batch.num_sequences].tolist() for batch in batches]
    named = [[tuple(b.tokens[i + 1 : i + 3].tolist()) for i in s] for b, s in zip(batches, starts, strict=True)]
    return {"dp_rank": run.topology.dp_rank, "named": named}


def evaluation_at_moved_weights(run: runs.Run) -> list[dict]:
    """Held-out metrics after every weight has grown by 5%: of all seven pairs, of the first six, of the last twice."""
    data = dpo.load_pairs(run.config.algorithm.preference)
    encoded = dpo.encode_all(data.held_out, run)
    run.reference = FrozenReference(run.policy.models)
    sets = [dpo.pack_held_out(run, pairs) for pairs in (encoded, encoded[:-1], encoded[-1:] * 2)]
    with torch.no_grad():
        for model in run.policy.models:
            for parameter in model.parameters():
                parameter.mul_(1.05)
    metrics = [dpo.evaluate_pairs(run, held) for held in sets]
    with torch.no_grad():
        for model in run.policy.models:
            for parameter in model.parameters():
                parameter.div_(1.05)
    return metrics


def length_normalised(run: runs.Run) -> dict:
    """Evaluations of one pair without and with means over its answers' tokens, and a step on 16 copies of it with."""
    pairs = dpo.encode_all(dpo.load_pairs(run.config.algorithm.preference).held_out, run)
    pair = next(one for one in pairs if one.chosen.response_length != one.rejected.response_length)
    held = dpo.pack_held_out(run, [pair] * 2)
    sums = dpo.evaluate_pairs(run, held)
    preference = dataclasses.replace(run.config.algorithm.preference, length_normalised=True)
    algorithm = dataclasses.replace(run.config.algorithm, preference=preference)
    run.config = dataclasses.replace(run.config, algorithm=algorithm)
    means = dpo.evaluate_pairs(run, held)
    row = dpo.run_step(run, policy_loss(algorithm), [pair], STEPS + 1)
    return {
        "lengths": [side.response_length for side in (pair.chosen, pair.rejected)],
        "sums": [sums["dpo/eval_chosen"], sums["dpo/eval_rejected"]],
        "means": [means["dpo/eval_chosen"], means["dpo/eval_rejected"]],
        "eval": (means["dpo/eval_margin"], means["dpo/eval_loss"]),
        "step": (row["dpo/margin"], row["loss"]),
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    """By rank: what happened in each layout."""
    folder = tmp_path_factory.mktemp("dpo")
    return spawn(in_layouts, 2, write_pairs(folder), timeout=280)


def rows_of(results: list[dict], layout: str) -> list[dict]:
    return load_record(results[0][layout]["folder"]).dpo


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pairs_stay_whole_and_each_is_packed_once(results, layout):
    by_replica = {result[layout]["dp_rank"]: result[layout]["named"] for result in results}
    assert len(by_replica) == (2 if layout == "DP2" else 1)
    microbatches = [batch for batches in by_replica.values() for batch in batches]
    assert len(microbatches) > 2
    for batch in microbatches:
        assert [b for a, b in batch[::2]] == [a for a, b in batch[::2]]  # chosen: 2p, 2p
        assert batch[1::2] == [(a, a + 1) for a, b in batch[::2]]  # followed by the rejected of the same p
    assert sorted(a for batch in microbatches for a, _ in batch[::2]) == [2 * p for p in range(16)]
    sizes = {len(batches) for batches in by_replica.values()}
    assert len(sizes) == 1 and (layout != "PP2xVP2" or sizes.pop() % 2 == 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_margin_and_held_out_accuracy_rise(results, layout):
    rows = rows_of(results, layout)
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    start, end = rows[0], rows[-1]
    assert (start["dpo/eval_margin"], start["dpo/eval_accuracy"], start["dpo/eval_num"]) == (0, 0.5, HELD_OUT)
    assert start["dpo/eval_loss"] == pytest.approx(math.log(2), abs=1e-12)
    assert rows[1]["loss"] == pytest.approx(math.log(2), abs=1e-12) and rows[1]["dpo/margin"] == 0
    assert [row["step"] for row in rows if "dpo/eval_margin" in row] == [0, 5, 10, STEPS]
    assert end["dpo/eval_accuracy"] == 1 and end["dpo/accuracy"] > 0.9
    assert end["dpo/margin"] > 0.3 and end["dpo/eval_margin"] > 0.3 and end["loss"] < 0.6 > end["dpo/eval_loss"]
    assert end["dpo/margin"] == pytest.approx(0.1 * (end["dpo/chosen"] - end["dpo/rejected"]), abs=1e-9)
    wanted = {"grad_norm", "lr", "time/step", "time/update", "time/ref_logprobs", "perf/tokens_per_second"}
    assert wanted <= set(end) and end["lr"] == pytest.approx(1e-3) and end["route/load_imbalance"] > 1


def test_layouts_learn_the_same(results):
    """Until rounding has grown by Adam's first steps: half a percent of the margin after 3 steps."""
    first, *others = (rows_of(results, layout) for layout in LAYOUTS)
    assert first[3]["dpo/margin"] > 0.005
    for rows in others:
        assert rows[1]["grad_norm"] == pytest.approx(first[1]["grad_norm"], rel=1e-4)
        assert rows[3]["dpo/margin"] == pytest.approx(first[3]["dpo/margin"], rel=5e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_evaluation_counts_each_held_out_pair_once(results, layout):
    """Seven pairs need a filler, on two replicas as with virtual stages; the sum over seven is that over six and one.
    The last pair is the filler: counted twice it would show. (Sums of log-probs over a sequence round by 4e-6 in fp32.)
    """
    seven, six, last = results[0][layout]["moved"]
    for name in ("margin", "accuracy", "chosen", "rejected", "loss"):
        key = f"dpo/eval_{name}"
        assert 7 * seven[key] == pytest.approx(6 * six[key] + last[key], rel=1e-4, abs=2e-5)
        assert seven[key] == pytest.approx(results[0]["DP2"]["moved"][0][key], rel=1e-4, abs=2e-5)
        assert results[1][layout]["moved"][0][key] == seven[key]  # on every rank
    assert abs(seven["dpo/eval_margin"] - last["dpo/eval_margin"]) > 1e-3 and seven["dpo/eval_num"] == HELD_OUT


@pytest.mark.parametrize("layout", LAYOUTS)
def test_length_normalised_compares_means(results, layout):
    """Each sum is divided by its own answer's tokens, of which the two differ; of equal pairs the loss is
    log(1 + e^-margin), in the evaluation as in the step, whose loss comes from the update itself."""
    for result in results:
        found = result[layout]["normalised"]
        assert found["lengths"][0] != found["lengths"][1]
        for total, mean, length in zip(found["sums"], found["means"], found["lengths"], strict=True):
            assert mean == pytest.approx(total / length, rel=1e-12) and abs(total) > 0.1
        for margin, loss in (found["eval"], found["step"]):
            assert margin == pytest.approx(0.1 * (found["means"][0] - found["means"][1]), rel=1e-4)
            assert loss == pytest.approx(math.log1p(math.exp(-margin)), rel=1e-9)


def test_numbers_come_back_in_the_order_of_the_pairs():
    """Pairs of 11, 11 and 4 tokens: the third joins the first, so sequences 4 and 5 come before 2 and 3."""
    sequences = [TrainSequence([1] * length, 1) for length in (9, 2, 3, 8, 2, 2)]
    batches = pack(sequences, max_tokens=16, pad_to_multiple=1, unit=2)
    assert dpo.unpacked(torch.tensor([0.0, 1.0, 4.0, 5.0, 2.0, 3.0]), batches).tolist() == [0, 1, 2, 3, 4, 5]


def test_dpo_takes_the_place_of_rl(monkeypatch, tmp_path):
    calls: list[str] = []
    steps = ("encode_pairs", "warm_start", "train_preferences", "reinforce", "finish")
    for owner, name in ((train.build, "close_run"), *((train, name) for name in steps)):
        monkeypatch.setattr(owner, name, lambda *_, name=name: calls.append(name))
    monkeypatch.setattr(train, "Watchdog", lambda *_: SimpleNamespace(stop=lambda: None))
    monkeypatch.setattr(
        train.build,
        "build_run",
        lambda config: SimpleNamespace(config=config, topology=SimpleNamespace(coordinates="")),
    )
    layout = LAYOUTS["DP2"]
    train.train(configured(tmp_path / "pairs.jsonl", layout), layout)
    train.train(TrainConfig(), layout)
    assert calls == [
        "encode_pairs",
        "warm_start",
        "train_preferences",
        "finish",
        "close_run",
        "warm_start",
        "reinforce",
        "finish",
        "close_run",
    ]


def test_a_run_is_drawn_but_not_judged_as_rl(results):
    folder = results[0]["DP2"]["folder"]
    assert {path.stem for path in draw(folder)} == {"preference", "overview"}
    with pytest.raises(GspoError, match="a DPO run, which has no RL steps to judge"):
        summarise(folder)


def test_metrics_by_hand():
    """h = 3, -1 and 0; beta 0.5: margins 1.5, -0.5, 0; a tie is half right."""
    log_ratios = torch.tensor([[1.0, -2.0], [0.5, 1.5], [2.0, 2.0]], dtype=torch.float64)
    found = pair_metrics(log_ratios, PreferenceConfig(beta=0.5))
    loss = (math.log1p(math.exp(-1.5)) + math.log1p(math.exp(0.5)) + math.log(2)) / 3
    expected = {"margin": 1 / 3, "accuracy": 0.5, "chosen": 3.5 / 3, "rejected": 0.5, "loss": loss}
    assert found == pytest.approx(expected)
    ipo = pair_metrics(log_ratios, PreferenceConfig(beta=0.5, loss="ipo"))
    assert ipo == pytest.approx(expected | {"loss": (4 + 4 + 1) / 3})


@pytest.mark.parametrize(
    ("chosen", "text"),
    [
        ((9, 8), "data.max_prompt_length = 8: the prompt of x, line 3, has 9 tokens. Give .* at least 9"),
        ((4, 13), "x, line 3: prompt and answer have 17 tokens, more than the model's max_position_embeddings 16"),
        ((4, 12), "max_tokens_per_microbatch = 20: the pair of x, line 3, has 16 . 5 tokens .* at least 21"),
        ((4, 11), None),
    ],
)
def test_a_pair_that_is_too_long_is_named(chosen, text):
    prompt, answer = chosen
    pair = EncodedPair(TrainSequence([1] * (prompt + answer), prompt), TrainSequence([1] * (prompt + 1), prompt))
    config = TrainConfig(max_tokens_per_microbatch=20, data=DataConfig(max_prompt_length=8))
    if text is None:
        check_length(pair, "x, line 3", config, positions=16)
    else:
        with pytest.raises(RolloutError, match=text):
            check_length(pair, "x, line 3", config, positions=16)


def test_both_answers_are_what_the_template_writes():
    """A base model's ChatML ends a turn with <|im_end|>, though its tokenizer's eos is another; an answer that has it
    already gets it once, and a pair that this makes one is refused."""
    made = tokenizer(CHATML, eos="<|endoftext|>")
    stops = (made.eos_token_id, made.convert_tokens_to_ids("<|im_end|>"))
    pair = encode_pair(PreferencePair("Capital?", "Paris", "Rome<|im_end|>"), made, stops)
    texts = [made.decode(one.token_ids[one.prompt_length :]) for one in (pair.chosen, pair.rejected)]
    assert texts == ["Paris<|im_end|>", "Rome<|im_end|>"]
    with pytest.raises(RolloutError, match="x, line 3: the chat template makes the same tokens"):
        encode_pair(PreferencePair("Capital?", "Paris", "Paris<|im_end|>", "x, line 3"), made, stops)
