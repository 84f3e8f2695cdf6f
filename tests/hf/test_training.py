"""Training from a Hugging Face folder: gradients are transformers' in every layout, and a run starts from what another
run exported.

Gradients are compared tensor by tensor: the tables split gradients as they split weights, because they only move
numbers.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gspo_megatron.algorithms.supervised import supervised_loss
from gspo_megatron.backend.engine.microbatches import global_counts, microbatches
from gspo_megatron.backend.model import parameters
from gspo_megatron.backend.model.shape import ModelShape
from gspo_megatron.backend.parallel import runtime, topology
from gspo_megatron.batch import TrainSequence
from gspo_megatron.config import DataConfig, Layout, ModelConfig, RolloutConfig, TrainConfig, WarmStartConfig
from gspo_megatron.models import table
from gspo_megatron.models.operators import Piece
from gspo_megatron.trainer import build
from gspo_megatron.trainer.build import build_policy
from gspo_megatron.trainer.gspo_trainer import GspoTrainer
from gspo_megatron.trainer.rl import run_step
from gspo_megatron.trainer.train import train
from tools.validation.ranks import spawn
from tools.validation.round_trip import TINY, write_model

ONE, TP2, PP2, MIXED = (Layout(t, p, None, e, 1) for t, p, e in ((1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 2)))
DENSE = Layout(2, 2, None, 1, 1)
FAMILIES = (
    "qwen3_next",
    "qwen2_moe",
    "mixtral",
    "olmoe",
    "glm4_moe groups",
    "deepseek_v2",
    "deepseek_v3",
    "gpt_oss",
    "llama",
)


def examples() -> list[TrainSequence]:
    """Four sequences, of which the first two tokens are given."""
    generator = torch.Generator().manual_seed(1)
    return [TrainSequence(torch.randint(0, 192, (n,), generator=generator).tolist(), 2) for n in (9, 12, 5, 12)]


def gradients(rank: int, world_size: int, folder: Path, layouts: list[Layout]) -> dict:
    """{(family, number of the layout): (loss, {published piece: gradient})} of the supervised loss."""
    found = {}
    for name in FAMILIES:
        for number, layout in enumerate(layouts):
            is_dense = layout == MIXED and name == "llama"
            found[name, number] = one_gradient(folder / name, DENSE if is_dense else layout)
            topology.destroy_model_parallel()
    return found


def one_gradient(folder: Path, layout: Layout) -> tuple[float, dict[Piece, torch.Tensor]]:
    started = runtime.init_process_group("cpu")
    cut = topology.initialize_model_parallel(layout, seed=1)
    shape = ModelShape.of_folder(folder)
    config = replace(TrainConfig(), parallel=layout, model=ModelConfig(load_hf=folder))
    policy = build_policy(config, shape, cut, started, torch.float64)
    policy.start_optimizer()
    for part in policy.optimizer.chained_optimizers:
        part.config.clip_grad = 0.0  # Megatron scales main_grad in place when it clips
    batches = microbatches(examples()[cut.dp_rank :: cut.dp_size], 24, cut, started.device)
    result = policy.update(batches, supervised_loss, global_counts(batches, cut))
    loss = torch.tensor(result.stats.loss, dtype=torch.float64)
    torch.distributed.all_reduce(loss, group=cut.dp_group)
    full = parameters.gather_full(policy.models, cut, lambda p: p.main_grad)
    split: dict[Piece, torch.Tensor] = {}
    for entry in table.entries(shape.architecture).values():
        if entry.name in full:  # router biases have no gradient
            pieces = entry.operator.split(full[entry.name])
            split |= dict(zip(entry.pieces, pieces, strict=True))
    norm = float(torch.stack([gradient.norm() for gradient in full.values()]).norm())
    assert result.grad_norm == pytest.approx(norm, rel=1e-6)  # Megatron counts every slice once
    return float(loss), split


def taken(tensor: torch.Tensor, piece: Piece) -> torch.Tensor:
    """The piece's rows."""
    return torch.cat(tensor.chunk(piece.parts)[piece.part : piece.part + piece.count])


def truth(folder: Path) -> tuple[float, dict[Piece, torch.Tensor]]:
    """Loss and gradients by transformers, of published pieces."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
    total, number = 0.0, 0
    for sequence in examples():
        tokens = torch.tensor(sequence.token_ids)
        logprobs = torch.log_softmax(model(tokens[None]).logits[0, :-1], -1)
        chosen = logprobs.gather(1, tokens[1:, None])[1:]
        total, number = total - chosen.sum(), number + chosen.numel()
    (total / number).backward()
    arch = ModelShape.of_folder(folder).architecture
    grads, found = {name: p.grad for name, p in model.named_parameters()}, {}
    published = table.entries(arch)
    for name, entry in table.entries(arch, is_stacked=True).items():
        for piece, to in zip(entry.pieces, published[name].pieces, strict=True):
            if piece.tensor in grads:
                whole = grads[piece.tensor] if piece.expert is None else grads[piece.tensor][piece.expert]
                found[to] = taken(whole.t() if piece.transposed else whole, piece)
    return float(total / number), found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gradients")
    for name in FAMILIES:
        write_model(folder / name, TINY[name])
    return folder


@pytest.fixture(scope="module")
def found(folder) -> dict:
    return spawn(gradients, 4, folder, [ONE, TP2, MIXED], timeout=280)[0]


@pytest.mark.parametrize("layout", range(3), ids=["DP4", "TP2 DP2", "TP2 PP2 EP2"])
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_transformers(found, folder, name, layout):
    """fp64, but for transformers' norms and router softmax, which are fp32: loss to 1e-6, each gradient to 1e-4 of its
    norm. The same to 1e-6 between layouts (Megatron's sigmoid router is fp32)."""
    loss, expected = truth(folder / name)
    assert found[name, layout][0] == pytest.approx(loss, rel=1e-6)
    ours, first = found[name, layout][1], found[name, 0][1]
    assert set(ours) == set(expected)
    for tensor, gradient in expected.items():
        scale = float(gradient.norm())
        assert float((ours[tensor] - gradient).norm()) <= 1e-4 * scale + 1e-9, tensor
        assert float((ours[tensor] - first[tensor]).norm()) <= 1e-6 * scale + 1e-12, tensor


RUN = TrainConfig(
    steps=1,
    save_hf=True,
    data=DataConfig(max_prompt_length=64, num_eval_prompts=4, eval_samples=1),
    warm_start=WarmStartConfig(steps=1, num_examples=16, batch_size=8, eval_interval=99),
    rollout=RolloutConfig(num_prompts=4, group_size=2, max_response_length=6),
    max_tokens_per_microbatch=512,
)


def first_run(rank: int, world_size: int, folder: Path) -> None:
    train(replace(RUN, output_dir=folder), PP2)


def second_run(rank: int, world_size: int, folder: Path) -> dict:
    """Starts from the first run's export in another layout, and takes an RL step."""
    config = replace(RUN, output_dir=folder, model=ModelConfig(load_hf=folder / "moe_gspo/hf")).resolved(TP2)
    run = build.build_run(config)
    start = parameters.gather_full(run.policy.models, run.topology)
    run.policy.start_optimizer()
    row = run_step(run, GspoTrainer(run.config, policy=run.policy), 1)
    answer = {"start": start, "loss": row["loss"], "tokens": run.tokenizer.encode("a b c 1 2 3")}
    build.close_run(run)
    return answer


def test_a_run_starts_from_another_run_s_export(tmp_path):
    """Trained and exported at PP2, loaded at TP2 and by transformers: one set of weights, one tokenizer."""
    spawn(first_run, 2, tmp_path)
    exported = tmp_path / "moe_gspo/hf"
    answer = spawn(second_run, 2, tmp_path)[0]
    model, told = AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.encode("a b c 1 2 3") == answer["tokens"]
    arch = ModelShape.of_folder(exported).architecture
    state = model.state_dict()
    for name, entry in table.entries(arch, is_stacked=True).items():
        pieces = [state[p.tensor] if p.expert is None else state[p.tensor][p.expert] for p in entry.pieces]
        pieces = [taken(tensor, p) for tensor, p in zip(pieces, entry.pieces, strict=True)]
        assert torch.equal(entry.operator.merge(pieces), answer["start"][name]), name
