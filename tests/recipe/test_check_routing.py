"""What the `routing` section of a recipe refuses, before anything starts."""

import json
from dataclasses import replace

import pytest

from gspo_megatron.config import AlgorithmConfig, Layout, ModelConfig, RoutingConfig, TrainConfig
from gspo_megatron.errors import ConfigError
from gspo_megatron.recipe import check
from tools.validation.round_trip import TINY

ONE = Layout(1, 1, None, 1, 1, context_parallel_size=1)
R2 = RoutingConfig(replay="R2")


def test_replay_needs_nothing_else():
    for replay in ("none", "R2", "R3"):
        check.check(replace(TrainConfig(), routing=RoutingConfig(replay=replay, diagnostics_interval=10)), ONE, 1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"routing": RoutingConfig(replay="R2", statistics=False)}, "Give routing.statistics true, or none."),
        ({"routing": R2, "algorithm": AlgorithmConfig(old_logprobs="rollout")}, "algorithm.old_logprobs is rollout"),
        ({"routing": R2, "algorithm": AlgorithmConfig(old_logprobs="first_minibatch")}, "first_minibatch"),
        (
            {"routing": RoutingConfig(diagnostics_interval=5, statistics=False)},
            "routing.diagnostics_interval = 5: uses what the statistics note. Give routing.statistics true, or 0.",
        ),
    ],
)
def test_what_cannot_work_is_refused(changes, words):
    with pytest.raises(ConfigError) as caught:
        check.check(replace(TrainConfig(), **changes), ONE, 1)
    assert words in str(caught.value)


def test_a_dense_model_has_no_routes(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY["llama"] | {"max_position_embeddings": 512}))
    config = replace(TrainConfig(), routing=R2, model=ModelConfig(hf_config=path))
    with pytest.raises(ConfigError, match=r"routing.replay = 'R2': the model is dense \(llama\). Give none."):
        check.check(config, ONE, 1)
    check.check(replace(config, routing=RoutingConfig()), ONE, 1)


def test_a_negative_interval_is_refused():
    with pytest.raises(ConfigError, match="routing.diagnostics_interval = -1"):
        RoutingConfig(diagnostics_interval=-1)
