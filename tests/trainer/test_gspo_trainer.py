"""GspoTrainer: what other systems hand over is learned from as if one rank had it all."""

import dataclasses
import math
import random
import subprocess
import sys
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gspo_megatron import GspoTrainer, RolloutGroup, Turns
from gspo_megatron.backend.parallel import topology
from gspo_megatron.config import AlgorithmConfig, OptimizerConfig, ParallelConfig, TrainConfig
from gspo_megatron.data.tokenizer import train_tokenizer
from gspo_megatron.errors import RolloutError
from tools.validation.launching import ROOT, TORCHRUN
from tools.validation.ranks import spawn
from tools.validation.round_trip import TINY, VOCAB, write_model

LAYOUTS = {
    "TP2xDP2": ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=1,
                              expert_model_parallel_size=1),
    "PP2xDP2": ParallelConfig(tensor_model_parallel_size=1, pipeline_model_parallel_size=2,
                              expert_model_parallel_size=1),
    "CP2xDP2": ParallelConfig(tensor_model_parallel_size=1, pipeline_model_parallel_size=1,
                              expert_model_parallel_size=1, context_parallel_size=2),
}  # fmt: skip
SIZES = (3, 5, 2, 6, 4)  # responses of each group
# With an epsilon this large Adam's first step is lr * g / (1 + |g|): the change of the weights is the gradient.
CONFIG = TrainConfig(
    algorithm=AlgorithmConfig(num_minibatches=1, old_logprobs="rollout"),
    optimizer=OptimizerConfig(lr=1.0, adam_eps=1.0, warmup_steps=0, clip_grad=1e9),
    max_tokens_per_microbatch=128,
)


def drawn(sizes: tuple[int, ...] = SIZES) -> tuple[list[list[int]], list[list[list[int]]], list[list[float]]]:
    """Prompts, responses and rewards of groups of these sizes."""
    chance = random.Random(5)
    words = lambda low, high: [chance.randrange(VOCAB) for _ in range(chance.randint(low, high))]  # noqa: E731
    prompts = [words(3, 8) for _ in sizes]
    answers = [[words(2, 12) for _ in range(size)] for size in sizes]
    return prompts, answers, [[chance.choice((0.0, 0.5, 1.0)) + 0.1 * i for i in range(size)] for size in sizes]


def old(trainer: GspoTrainer, prompts: list, answers: list, is_first: bool) -> list[list[list[float]]]:
    """Log-probs as a sampler with slightly other weights might have given them: off by up to 1e-3."""
    asked = [(prompt, answer) for prompt, group in zip(prompts, answers, strict=True) for answer in group]
    found = iter(trainer.log_probs(asked if is_first else []))
    chance = random.Random(7)
    return [[[value + chance.uniform(-1e-3, 1e-3) for value in next(found)] for _ in group] for group in answers]


def turns(answers: list[list[list[int]]]) -> tuple[list, list]:
    """Up to three turns of each response, with what each brought, and masks with the last token but one of each turn
    that has three or more as somebody else's."""
    chance, masks, found = random.Random(9), [], []
    for group in answers:
        cuts = [sorted({0, *chance.sample(range(1, len(ids)), min(2, len(ids) - 1))}) for ids in group]
        found.append([Turns(tuple(cut), tuple(chance.choice((0.0, 0.25, 0.5)) for _ in cut)) for cut in cuts])
        ends = [
            [b - 2 for a, b in pairwise([*cut, len(ids)]) if b - a > 2] for cut, ids in zip(cuts, group, strict=True)
        ]
        masks.append([[int(t not in end) for t in range(len(ids))] for end, ids in zip(ends, group, strict=True)])
    return masks, found


def stepped(rank: int, world_size: int, layouts: dict, folder: Path, sizes: tuple[int, ...], count: int) -> dict:
    """{layout: (metrics, change of the weights, log-probs as handed over)} of one step on groups of rank 0; the keys of
    those whose turns have advantages of their own end in "by turn"."""
    results = {}
    by_sequence = dataclasses.replace(CONFIG.algorithm, num_minibatches=count)
    by_turn = dataclasses.replace(by_sequence, name="gspo_token", advantage_level="turn")
    algorithms = {"": by_sequence} | ({" by turn": by_turn} if sizes == SIZES else {})
    for (name, parallel), (level, algorithm) in product(layouts.items(), algorithms.items()):
        trainer = GspoTrainer(dataclasses.replace(CONFIG, parallel=parallel, algorithm=algorithm), model=folder)
        before = {key: tensor.clone() for key, tensor in trainer.weights() if tensor is not None}
        prompts, answers, rewards = drawn(sizes)
        logprobs = old(trainer, prompts, answers, rank == 0)
        parts = zip(prompts, answers, rewards, logprobs, *turns(answers), strict=True)
        groups = [
            RolloutGroup.of(*four, loss_masks=masks if level else None, turns=cuts if level else None)
            for *four, masks, cuts in parts
        ]
        metrics = trainer.step(groups if rank == 0 else [])
        after = {key: tensor for key, tensor in trainer.weights() if tensor is not None}
        change = torch.cat([(after[key] - before[key]).flatten() for key in before]) if before else None
        results[name + level] = (metrics, change, logprobs)
        topology.destroy_model_parallel()
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("model") / "hf"
    write_model(made, TINY["qwen3_moe"] | {"vocab_size": 320})
    train_tokenizer(["a"], 260).save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def alone(folder) -> dict:
    return spawn(stepped, 1, {"one": ParallelConfig()}, folder, SIZES, 1, timeout=200)[0]


@pytest.fixture(scope="module")
def spread(folder) -> list[dict]:
    return spawn(stepped, 4, LAYOUTS, folder, SIZES, 1, timeout=280)


@pytest.mark.parametrize("level", ["", " by turn"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_groups_of_rank_0_are_learned_from_as_on_one_rank(layout, level, alone, spread):
    """Loss and gradient, with five groups of 2 to 6 responses over two replicas; by turn too, where these are other
    ones."""
    assert (alone["one"][1] - alone["one by turn"][1]).abs().max() > 0.1 * alone["one"][1].abs().max()
    alone, layout = alone["one" + level], layout + level
    metrics, change, logprobs = spread[0][layout]
    assert metrics["loss"] == pytest.approx(alone[0]["loss"], abs=1e-6)
    assert metrics["grad_norm"] == pytest.approx(alone[0]["grad_norm"], rel=1e-4)
    assert (change - alone[1]).abs().max() <= 1e-4 * alone[1].abs().max()
    assert all(part[layout][0] == metrics for part in spread[1:])
    assert metrics["reward/mean"] == pytest.approx(alone[0]["reward/mean"], abs=1e-12)
    flat = [value for group in logprobs for answer in group for value in answer]
    assert flat == pytest.approx([v for group in alone[2] for answer in group for v in answer], abs=2e-5)


def test_the_loss_by_hand(alone, folder):
    """-mean_i min(s_i A_i, clip(s_i, 1 - 3e-4, 1 + 4e-4) A_i), A_i = (r_i - mean) / (std + 1e-6), and s_i from the
    noise that was added: log s_i = -mean_t noise_t."""
    alone, (_, answers, rewards) = alone["one"], drawn()
    chance, total, number = random.Random(7), 0.0, 0
    for group, values in zip(answers, rewards, strict=True):
        mean = sum(values) / len(values)
        std = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
        for answer, value in zip(group, values, strict=True):
            s = math.exp(-sum(chance.uniform(-1e-3, 1e-3) for _ in answer) / len(answer))
            advantage = (value - mean) / (std + 1e-6)
            total += min(s * advantage, min(max(s, 1 - 3e-4), 1 + 4e-4) * advantage)
            number += 1
    assert number == sum(SIZES) == 20
    assert alone[0]["loss"] == pytest.approx(-total / number, abs=2e-7)


def test_a_batch_smaller_than_the_replicas(folder):
    """One group of three responses in two minibatches over four replicas: five fillers, which count nowhere."""
    one = spawn(stepped, 1, {"one": ParallelConfig()}, folder, (3,), 2, timeout=200)[0]["one"]
    four = spawn(stepped, 4, {"DP4": dataclasses.replace(LAYOUTS["TP2xDP2"], tensor_model_parallel_size=1)}, folder,
                 (3,), 2, timeout=200)[0]["DP4"]  # fmt: skip
    assert four[0]["loss"] == pytest.approx(one[0]["loss"], abs=1e-6)
    assert (four[1] - one[1]).abs().max() <= 1e-4 * one[1].abs().max()
    for name in ("reward/mean", "response/length", "advantage/mean", "ratio/mean"):
        assert four[0][name] == pytest.approx(one[0][name], abs=1e-6)


def refused(rank: int, world_size: int, folder: Path) -> list[str]:
    """What each way to hand over wrongly says, on this rank; the trainer lives on."""
    trainer = GspoTrainer(dataclasses.replace(CONFIG, parallel=LAYOUTS["TP2xDP2"]), model=folder)
    group = RolloutGroup.of([1, 2], [[3], [4]], [0.0, 1.0])
    without = dataclasses.replace(group, scores=[])
    told = []
    odd, long = (RolloutGroup.of([1, 2], [ids], [0.0], [[-1.0] * len(ids)]) for ids in ([320], [3] * 63))
    for groups in (
        [],
        [group],
        [group] * (rank == 0),
        [without] * (rank == 1),
        [odd] * (rank == 2),
        [long] * (rank == 3),
    ):
        with pytest.raises(RolloutError) as caught:
            trainer.step(groups)
        told.append(str(caught.value))
    assert trainer.version == 0
    wrong = RolloutGroup.of([1, 2], [[3, 4]], [0.0], [[-1.0, -2.0]], turns=[Turns((0, 2), (0.0, 1.0))])
    with pytest.raises(RolloutError) as caught:
        trainer.step([wrong] * (rank == 0))
    told.append(str(caught.value))
    given = RolloutGroup.of([1, 2], [[3], [4]], [0.0, 1.0], [[-1.0], [-2.0]])
    trainer.step([given] * (rank == 3))
    assert trainer.version == 1
    return told


def test_what_cannot_be_learned_from_is_an_error_on_every_rank(folder):
    everyone = spawn(refused, 4, folder, timeout=200)
    parts = ("no rank handed over a group", "each of which would be trained on 4 times", "has no log-probs",
             "2 responses and 0 scores", "token 320 is not in the vocabulary of 320",
             "have 65 tokens, and the model has 64 positions", "response 0: starts[1] = 2 must be below")  # fmt: skip
    for told in everyone:
        assert all(part in text for part, text in zip(parts, told, strict=True))


def saved(rank: int, world_size: int, model: Path, folder: Path) -> dict:
    """Weights after two steps, and after one step, a checkpoint and one more in another trainer."""
    config = dataclasses.replace(CONFIG, parallel=LAYOUTS["PP2xDP2"])
    config = dataclasses.replace(config, algorithm=AlgorithmConfig(num_minibatches=2))
    prompts, answers, rewards = drawn()
    groups = [RolloutGroup.of(*parts) for parts in zip(prompts, answers, rewards, strict=True)] if rank == 0 else []
    found = {}
    first = GspoTrainer(config, model=model)
    found["start"] = {key: tensor.clone() for key, tensor in first.weights() if tensor is not None}
    found["stacked"] = {key: tensor.clone() for key, tensor in first.weights(is_stacked=True) if tensor is not None}
    first.step(groups)
    first.save(folder / "checkpoint")
    first.step(groups)
    found["whole"] = {key: tensor.clone() for key, tensor in first.weights() if tensor is not None}
    topology.destroy_model_parallel()
    second = GspoTrainer(config, model=model)
    second.load(folder / "checkpoint")
    assert second.version == 1
    second.step(groups)
    found["parts"] = {key: tensor for key, tensor in second.weights() if tensor is not None}
    assert first.version == second.version == 2
    return found


def test_a_checkpoint_goes_on_to_the_bit_and_weights_have_hugging_faces_names(folder, tmp_path):
    found = spawn(saved, 4, folder, tmp_path, timeout=200)[0]
    stored = load_file(folder / "model.safetensors")
    assert found["start"].keys() == stored.keys()
    assert all(torch.equal(found["start"][name], stored[name]) for name in stored)
    held = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert found["stacked"].keys() == held.keys()
    assert all(torch.equal(found["stacked"][name], held[name]) for name in held)
    assert all(torch.equal(found["parts"][name], found["whole"][name]) for name in stored)
    assert any(not torch.equal(found["whole"][name], stored[name]) for name in stored)


def test_lists_that_differ_in_length_are_refused():
    with pytest.raises(ValueError, match="rewards has 1 entries for 2 responses"):
        RolloutGroup.of([1], [[2], [3]], [1.0])


def test_the_example_trains(folder):
    """Under torchrun on two ranks: three versions."""
    command = [*TORCHRUN, "--nproc-per-node", "2", str(ROOT / "examples/your_trainer.py"), str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [f"version {n}" for n in (1, 2, 3)]


def test_the_import_costs_nothing():
    code = "import gspo_megatron, sys; print('torch' in sys.modules, len(gspo_megatron.__all__))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.split() == ["False", "21"]
