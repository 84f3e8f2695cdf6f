"""What the command line chooses, and what it refuses before anything is trained."""

import pytest

from gspo_megatron.cli.study import KINDS, Options, chosen, main
from gspo_megatron.errors import ConfigError
from gspo_megatron.study import plan

REPLAY = KINDS["routing-replay"]


def test_parts_are_a_partition():
    """The jobs of a Slurm array train everything once."""
    whole = chosen(REPLAY, Options())
    parts = [chosen(REPLAY, Options(part=f"{number}/8")) for number in range(1, 9)]
    assert sorted(spec.name for part in parts for spec in part) == sorted(spec.name for spec in whole)


def test_only_chooses_by_name():
    assert {spec.arm for spec in chosen(REPLAY, Options(only="^grpo"))} == {"grpo", "grpo_R2", "grpo_R3"}
    assert {spec.seed for spec in chosen(REPLAY, Options(only="seed2$"))} == {2}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"part": "9/8"}, "--part = '9/8': is no part of a whole"),
        ({"seeds": 1}, "--seeds = 1: gives no interval"),
        ({"seeds": 100_000_000}, "--seeds = 100000000: must be at most 1,000"),
        ({"slots": 0}, "--slots = 0"),
        ({"slots": 1001}, "--slots = 1001: must be at most 1,000"),
        ({"part": "1/" + "9" * 5000}, "is no part of a whole"),
        ({"lr": (0.0,)}, "--lr"),
        ({"only": "("}, "--only = '(': is no regular expression"),
        ({"recipe": plan.RECIPE.with_name("none.yaml")}, "--recipe"),
    ],
)
def test_what_cannot_work_is_refused(changes, words):
    with pytest.raises(ConfigError) as caught:
        chosen(REPLAY, Options(**changes))
    assert words in str(caught.value)


def test_algorithms_are_all_that_have_rollouts():
    kind = KINDS["algorithms"]
    specs = chosen(kind, kind.defaults)
    assert {spec.arm for spec in specs} == {"gspo", "gspo_token", "grpo", "dr_grpo", "dapo", "ppo"}
    assert len(specs) == 6 * 3 * 3 and not any("routing.replay" in spec.overrides for spec in specs)


def test_the_study_must_be_named(capsys):
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2 and "routing-replay" in capsys.readouterr().err
