"""A run on a model that can do nothing but write token 3: its responses end there as in transformers, or the run says
that they do not end."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gspo_megatron.batch import TrainSequence
from gspo_megatron.config import DataConfig, Layout, ModelConfig, RolloutConfig, TrainConfig, WarmStartConfig
from gspo_megatron.data.tokenizer import train_tokenizer
from gspo_megatron.errors import RolloutError
from gspo_megatron.trainer import build
from gspo_megatron.trainer.evaluation import evaluate
from gspo_megatron.trainer.gspo_trainer import GspoTrainer
from gspo_megatron.trainer.rl import run_step
from gspo_megatron.trainer.sanity_checks import truncation_findings
from gspo_megatron.trainer.sft import check_length
from tools.validation.ranks import spawn
from tools.validation.round_trip import TINY, write_model

ONE = Layout(1, 1, None, 1, 1)
LIMIT = 12
CONFIG = TrainConfig(
    warm_start=WarmStartConfig(steps=0),
    data=DataConfig(num_eval_prompts=4, eval_samples=1),
    rollout=RolloutConfig(num_prompts=4, group_size=2, max_response_length=LIMIT),
)


def write_stubborn(folder: Path) -> None:
    """Every embedding is the same vector, no layer adds to it, and the LM head has that vector in row 3 alone."""
    write_model(folder, TINY["llama"] | {"vocab_size": 320, "max_position_embeddings": 128, "eos_token_id": 1})
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if "o_proj" in name or "down_proj" in name or "lm_head" in name:
            tensor.zero_()
        elif "embed" in name or name == "model.norm.weight":
            tensor.fill_(1.0)
    tensors["lm_head.weight"][3] = 1.0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    train_tokenizer(["a"], 260).save_pretrained(folder)


def runs(rank: int, world_size: int, folder: Path) -> dict:
    found = {}
    for name, eos in (("several", [1, 3]), ("one", 1)):
        write_stubborn(folder / name)
        (folder / name / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
        model = ModelConfig(load_hf=folder / name)
        config = dataclasses.replace(CONFIG, output_dir=folder, name=f"run_{name}", model=model)
        run = build.build_run(config.resolved(ONE))
        told: list[str] = []
        run.reporter.warn = told.append
        run.policy.start_optimizer()
        length = evaluate(run, "rl", 0)["eval/response_length"]
        row = run_step(run, GspoTrainer(run.config, policy=run.policy), 1)
        found[name] = {"stops": run.stops.token_ids, "eval": length, "told": told} | {
            key: row[f"response/{key}"] for key in ("length", "truncated")
        }
        build.close_run(run)
    return found


def test_a_response_ends_where_transformers_ends_it(tmp_path):
    """With [1, 3] in generation_config.json after 1 token; with 1 alone it goes on to the limit, and the run warns."""
    found = spawn(runs, 1, tmp_path)[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "several")
    written = model.generate(torch.tensor([[5, 6]]), max_new_tokens=LIMIT, do_sample=False)
    assert written.tolist() == [[5, 6, 3]]
    assert not any("response/truncated" in text for text in found["several"].pop("told"))
    assert found["several"] == {"stops": (1, 3), "eval": 1, "length": 1, "truncated": 0}
    assert found["one"] | {"told": []} == {"stops": (1,), "eval": LIMIT, "told": [], "length": LIMIT, "truncated": 1}
    (told,) = (text for text in found["one"]["told"] if "response/truncated" in text)
    (sure,) = (text for text in found["one"]["told"] if "faults.min_entropy" in text)
    assert "step 1: entropy is" in sure
    assert "step 1: response/truncated is 1.00" in told and "They would end at 1 <|endoftext|>." in told


@pytest.mark.parametrize(("truncated", "count"), [(0.5, 0), (0.95, 0), (0.96, 1), (1.0, 1)])
def test_the_warning_is_of_nearly_all(truncated, count):
    assert len(truncation_findings({"response/truncated": truncated}, 32, "1 <|endoftext|>", 0.95)) == count


@pytest.mark.parametrize(
    ("length", "context", "room", "words"),
    [
        (65, 1, 99, "have 65 tokens, more than the model's max_position_embeddings 64"),
        (65, 4, 99, "have 72 tokens, more than the model's max_position_embeddings 64"),
        (61, 1, 60, "have 61 tokens, more than max_tokens_per_microbatch 60"),
    ],
)
def test_a_warm_start_example_without_room_is_named(length, context, room, words):
    """The prompt is no longer than allowed, but the gold answer is. Context parallelism 4 pads to multiples of 8."""
    layout = dataclasses.replace(ONE, context_parallel_size=context)
    config = dataclasses.replace(CONFIG, max_tokens_per_microbatch=room).resolved(layout)
    check_length(TrainSequence([1] * 56, 10), "gcd", config, 64)
    with pytest.raises(RolloutError) as caught:
        check_length(TrainSequence([1] * length, 10), "gcd", config, 64)
    assert f"tasks.gcd: question and gold answer {words}" in str(caught.value)
