"""Checkpoints: complete or absent, and readable under another layout."""

from pathlib import Path

import pytest
import torch

from gspo_megatron.backend.checkpoint import saver, sharded
from gspo_megatron.backend.checkpoint.optimizer_state import MOMENTS, ParameterState
from gspo_megatron.backend.engine.policy import Policy
from gspo_megatron.backend.model import parameters
from gspo_megatron.backend.parallel import topology
from gspo_megatron.config import Layout
from gspo_megatron.errors import CheckpointError
from tests.backend.small import SINGLE, TP2_PP2_EP2, fixed_batches, in_layouts, small_policy
from tools.validation.ranks import spawn


def save(layout: Layout, folder: Path) -> dict:
    policy = small_policy(layout)
    saver.save({"": policy.network}, folder)
    return parameters.gather_full(policy.models, policy.topology)


def load(layout: Layout, folder: Path) -> dict:
    policy = small_policy(layout)
    with torch.no_grad():
        for model in policy.models:
            for parameter in model.parameters():
                parameter.zero_()
    sharded.load_weights(policy.network, folder)
    return parameters.gather_full(policy.models, policy.topology)


def log_probs(policy: Policy) -> torch.Tensor | None:
    """[T] of all targets of the fixed batches; None but on the last stage."""
    batches = fixed_batches()
    policy.fill_old_log_probs(batches)
    return torch.cat([batch.old_logprobs for batch in batches]) if policy.topology.is_last_stage else None


def log_probs_of(layout: Layout, folder: Path) -> torch.Tensor | None:
    policy = small_policy(layout)
    sharded.load_weights(policy.network, folder)
    return log_probs(policy)


def moved(rank: int, world_size: int, folder: Path) -> tuple[torch.Tensor | None, dict]:
    policy = small_policy(TP2_PP2_EP2)
    with torch.no_grad():
        for model in policy.models:
            for parameter in model.parameters():
                parameter.mul_(1.1)  # what small_policy begins with must not pass for what was loaded
    saver.save({"": policy.network}, folder)
    saved = log_probs(policy)
    topology.destroy_model_parallel()
    layouts = {"TP1 x PP4 x EP1": Layout(1, 4, None, 1, 1), "EP4": Layout(1, 1, None, 4, 1)}
    return saved, in_layouts(rank, world_size, layouts, log_probs_of, folder)


@pytest.mark.parametrize(("is_fused", "device"), [(True, "meta"), (False, "cpu")])
def test_adams_count_is_where_its_kernel_reads_it(is_fused, device):
    """torch places it so itself in a fresh state alone; `meta` stands for a GPU."""
    weight = torch.nn.Parameter(torch.zeros(3, device="meta"))
    adam = torch.optim.AdamW([weight])
    adam.param_groups[0]["fused"] = is_fused
    state = ParameterState(weight, weight, adam, None, None)
    state.write({name: torch.zeros(3, device="meta") for name in MOMENTS}, steps=7)
    assert adam.state[weight]["step"].device.type == device


def test_the_same_log_probs_under_another_layout(tmp_path):
    """Saved at TP2 x PP2 x EP2, loaded with four stages, and with one stage and two experts a rank: what the logits say
    of each target differs by fp32's rounding alone. (Log-probs here go down to -10.)"""
    results = spawn(moved, 4, tmp_path / "step_000001")
    saved = next(found for found, _ in results if found is not None)
    assert saved.std() > 0.5
    for name in results[0][1]:
        loaded = [found[name] for _, found in results if found[name] is not None]
        assert len(loaded) == (1 if "PP4" in name else 4)
        for one in loaded:
            torch.testing.assert_close(one, saved, rtol=0, atol=2e-5)


def save_and_load(rank: int, world_size: int, folder: Path) -> dict:
    saved = save(TP2_PP2_EP2, folder)
    topology.destroy_model_parallel()
    shared = Layout(2, 1, None, 2, 1, context_parallel_size=2)
    layouts = {"PP2xVP2": Layout(1, 2, 2, 1, 1), "DP4": SINGLE, "CP2xTP2-EP2": shared}
    loaded = in_layouts(rank, world_size, layouts, load, folder)
    save(shared, folder.parents[1] / "context" / "step_000001")
    topology.destroy_model_parallel()
    again = load(SINGLE, folder.parents[1] / "context" / "step_000001")
    topology.destroy_model_parallel()
    loaded["saved at CP2xTP2-EP2"] = again
    missing = small_policy(SINGLE)
    with pytest.raises(CheckpointError) as caught:
        sharded.load_weights(missing.network, folder.with_name("step_000009"))
    return {"saved": saved, "loaded": loaded, "message": str(caught.value)}


def test_weights_load_under_another_layout(tmp_path):
    """Saved at TP2 x PP2 with experts over 2 ranks; bit for bit the same at PP2 x VP2, at CP2 x TP2 (and saved
    there), and whole on each of four ranks. A folder that is not there is named."""
    folder = tmp_path / "checkpoints" / "step_000001"
    result = spawn(save_and_load, 4, folder)[0]
    assert [p.name for p in folder.parent.iterdir()] == ["step_000001"]  # nothing half-written beside it
    for loaded in result["loaded"].values():
        assert set(loaded) == set(result["saved"])
        assert all(torch.equal(loaded[name], value) for name, value in result["saved"].items())
    assert "step_000009" in result["message"]
