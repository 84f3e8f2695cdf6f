"""A collapse is said once, when it sets in; the example and the studies' runs stay silent."""

import json
import lzma
import tarfile

import pytest

from gspo_megatron.config import FaultsConfig
from gspo_megatron.errors import ConfigError
from gspo_megatron.models.families import architecture
from gspo_megatron.recipe.load import REPOSITORY
from gspo_megatron.trainer.collapse import CollapseWatch

TINY = json.loads((REPOSITORY / "examples/models/qwen3_moe_tiny/config.json").read_text())
MODEL = architecture(TINY, "tiny")  # 4 layers of 8 experts, of which a token gets 2: a load of at most 4 times the mean
HEALTHY = {
    "entropy": 0.6,
    "response/truncated": 0.01,
    "route/dead_experts": 1.0,
    "route/load_imbalance_max": 3.83,
}


def watch(**limits: float) -> CollapseWatch:
    return CollapseWatch(FaultsConfig(**limits), MODEL)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"entropy": 0.019}, "entropy is 0.019 nats, below faults.min_entropy = 0.02"),
        ({"response/truncated": 0.96}, "response/truncated is 0.96, above faults.max_truncated = 0.95"),
        ({"route/dead_experts": 4.0}, "route/dead_experts is 4 of 32 (all layers)"),  # 1/8
        ({"route/load_imbalance_max": 3.97}, "route/load_imbalance_max is 3.97 of 4 at most, a share of 0.993"),
        ({"route/load_imbalance_max": 4.0000001}, "a share of 1.000 above faults.max_expert_load = 0.99"),
    ],
)
def test_each_collapse_is_one_line_when_it_sets_in(changes, told):
    """Silent before, one sentence at the first step beyond the limit, silent afterwards."""
    one = watch()
    assert one.findings(HEALTHY) == []
    (sentence,) = one.findings(HEALTHY | changes)
    assert told in sentence
    assert one.findings(HEALTHY | changes) == one.findings(HEALTHY) == one.findings(HEALTHY | changes) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"entropy": 0.02},
        {"response/truncated": 0.95},
        {"route/dead_experts": 3.0},  # 3/32 = 0.094
        {"route/load_imbalance_max": 3.96},
        {"entropy": float("nan")},
        {"entropy": None, "route/dead_experts": None},
    ],
)
def test_at_a_limit_nothing_is_said(changes):
    assert watch().findings(HEALTHY | changes) == []


def test_two_at_once_are_two_lines_and_a_dense_model_s_row_has_fewer_metrics():
    assert len(watch().findings(HEALTHY | {"entropy": 0.0, "response/truncated": 1.0})) == 2
    dense = CollapseWatch(FaultsConfig(), architecture(TINY | {"model_type": "qwen3"}, "dense"))
    assert len(dense.findings({"entropy": 0.0, "response/truncated": 0.0})) == 1


def test_a_model_that_sends_every_token_to_all_experts_has_no_load_to_speak_of():
    both = CollapseWatch(FaultsConfig(), architecture(TINY | {"num_experts": 2, "num_experts_per_tok": 2}, "both"))
    assert both.findings({"route/load_imbalance_max": 1.0}) == []


def test_each_limit_is_the_recipe_s_and_may_be_turned_off():
    worst = {"entropy": 0.0, "response/truncated": 1.0, "route/dead_experts": 32.0, "route/load_imbalance_max": 4.0}
    assert len(watch().findings(worst)) == 4
    assert watch(min_entropy=0, max_truncated=1, max_dead_experts=1, max_expert_load=1).findings(worst) == []
    strict = watch(min_entropy=0.7, max_truncated=0, max_dead_experts=0, max_expert_load=0.9)
    assert len(strict.findings(HEALTHY)) == 4


@pytest.mark.parametrize("name", ["max_truncated", "max_dead_experts", "max_expert_load"])
@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_a_share_lies_between_0_and_1(name, value):
    with pytest.raises(ConfigError, match=f"faults.{name} = {value}: must be a share from 0 to 1"):
        FaultsConfig(**{name: value})


def test_runs_that_learned_stay_silent():
    """All steps of the algorithms' study, 54 runs of six algorithms at three learning rates; entropy falls to 0.1."""
    path = REPOSITORY / "docs/studies/algorithms/data.tar.xz"
    steps = 0
    with tarfile.open(fileobj=lzma.open(path)) as archive:
        for member in archive:
            one = watch()
            for line in archive.extractfile(member) if member.isfile() else []:
                row = json.loads(line)
                steps += "entropy" in row
                assert one.findings(row) == [], (member.name, row)
    assert steps > 2000
