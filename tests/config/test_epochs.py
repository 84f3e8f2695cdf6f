"""num_epochs is refused by name where it has nothing to count, or is not all that says how long a run is."""

from pathlib import Path

import pytest

from gspo_megatron.config import AlgorithmConfig, RewardConfig, RolloutConfig, TaskConfig, TrainConfig
from gspo_megatron.errors import ConfigError

SUMS = TaskConfig(data=Path("sums.jsonl"), reward=(RewardConfig("rewards.py:f"),))
PLAIN = {"num_epochs": 2, "tasks": {"sums": SUMS}}


def test_one_task_of_data_has_epochs():
    assert TrainConfig(**PLAIN).num_epochs == 2
    assert TrainConfig(**PLAIN | {"steps": 100}).num_epochs == 2  # the default of steps cannot be told from none


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_epochs": 0}, "^num_epochs = 0: must be greater than 0"),
        ({"num_epochs": -1}, "^num_epochs = -1"),
        ({"num_epochs": 1_000_001}, "^num_epochs = 1000001: must be at most 1,000,000"),
        ({"steps": 50}, "^num_epochs = 2: is given beside steps 50. Leave one"),
        ({"steps": 0}, "^num_epochs = 2: is given beside steps 0"),
        (
            {"tasks": {"spell_backward": TaskConfig()}},
            "^num_epochs = 2: counts the rows of one task .* are spell_backward",
        ),
        ({"tasks": {"a": SUMS, "b": SUMS}}, "^num_epochs = 2: counts the rows of one task .* are a, b. Give steps"),
        (
            {"tasks": {"a": SUMS, "spell_backward": TaskConfig()}},
            "^num_epochs = 2: counts the rows of one task of data",
        ),
        ({"algorithm": AlgorithmConfig("dpo")}, "^num_epochs = 2: counts rows of a task, and dpo"),
        ({"rollout": RolloutConfig(engine="files")}, "^num_epochs = 2: counts prompts that are sampled"),
    ],
)
def test_what_has_no_epochs_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**PLAIN | change)
