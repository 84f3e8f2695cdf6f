"""Episodes on the real engine and a real environment's process: tokens, masks and log-probs, in every layout alike."""

from pathlib import Path

import pytest
import torch.distributed as dist
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from gspo_megatron.batch import Prompt, RolloutGroup, TaskItem, Turns
from gspo_megatron.config import FaultsConfig, Layout, TaskConfig
from gspo_megatron.data.packing import pack
from gspo_megatron.data.sequences import train_sequences
from gspo_megatron.errors import RolloutError
from gspo_megatron.rollout.generation import Generator, join_context
from gspo_megatron.rollout.megatron_engine import MegatronEngine
from gspo_megatron.rollout.sampling import SamplingParams
from gspo_megatron.tasks.environments import EnvironmentRunner, Environments
from tests.backend.small import SINGLE, TP2_PP2_EP2, VOCAB, in_layouts, small_policy
from tools.validation.ranks import spawn

GROUP, LIMIT, TURNS = 2, 24, 3
VERSION = 5  # of the weights
END, USER, ASSISTANT = 0, 1, 2  # tokens that the template writes
STOPS = (END, *range(5, VOCAB, 6))
LAYOUTS = {
    "TP2 PP2 EP2": TP2_PP2_EP2,
    "DP4": Layout(1, 1, None, 1, 1),
    "EP2 DP2": Layout(1, 1, None, 2, 1),
    "CP2 PP2": Layout(1, 2, None, 1, 1, context_parallel_size=2),
    "PP2 VP2": Layout(1, 2, 2, 1, 1),
}
# It answers with the number of words that it got, which is the turn's reward where it is odd, ends by itself where that
# is 3, and fails at a word.
GAME = """
class Game:
    def reset(self, level):
        self.level = level
        return " w9" if level == "told" else None

    def step(self, text):
        words = text.split()
        if "w4" in words:
            raise ValueError("w4")
        return f"w{20 + len(words)} w8", len(words) == 3, float(len(words)) if len(words) % 2 else None

    def get_reward(self):
        return 0.125
"""


def words() -> PreTrainedTokenizerFast:
    """Token i is the word wi; an assistant's turn ends with w0, a user's begins with w1 and is answered after w2."""
    made = Tokenizer(WordLevel({f"w{i}": i for i in range(256)}, unk_token="w3"))
    made.pre_tokenizer = WhitespaceSplit()
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}w1 {{ m.content }} {% else %}w2 {{ m.content }} w0 {% endif %}"
        "{% endfor %}{% if add_generation_prompt %}w2{% endif %}"
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=template)


def prompts(levels: tuple[str, ...]) -> list[Prompt]:
    """Those of a task that has the game, and every fourth of one that has none."""
    made = []
    for uid, level in enumerate(levels):
        item = TaskItem("plain" if uid % 4 == 3 else "game", f"w{uid + 30}", "", {"level": level})
        made.append(Prompt(uid, item, [USER, uid + 30, ASSISTANT]))
    return made


def play(layout: Layout, folder: Path, levels: tuple[str, ...] = ("told", "easy") * 4) -> dict:
    policy = small_policy(layout)
    cut = policy.topology
    config = TaskConfig(data=folder, environment=f"{folder}/game.py:Game", max_turns=TURNS)
    runner = EnvironmentRunner("game", config, FaultsConfig())
    environments = Environments({"game": runner}, 8)
    engine = MegatronEngine(policy)
    engine.sync(VERSION)
    generator = Generator(engine, cut, policy.device, words(), environments)
    try:
        groups = generator.generate(prompts(levels), GROUP, LIMIT, SamplingParams(STOPS), seed=11)
    finally:
        runner.close()
    joined = join_context(groups, cut)
    sequences = train_sequences([scored(group) for group in joined])
    count = cut.pp_size if cut.vp_size > 1 else 1
    batches = pack(sequences, 4096, cut.microbatch_multiple, count, sequence_multiple=cut.sequence_multiple)
    policy.fill_old_log_probs(batches)
    errors = []
    for batch in [batch for batch in batches if batch.old_logprobs is not None]:
        dist.all_reduce(batch.old_logprobs, group=cut.cp_group)
        errors.append(float(((batch.old_logprobs - batch.rollout_logprobs) * batch.loss_mask).abs().max()))
    answers = [(group.prompt.token_ids, group.completions) for group in groups]
    return {
        "told": [
            [(p, c.token_ids, c.loss_mask, c.truncated, c.outcome, c.turns) for c in answer] for p, answer in answers
        ],
        "place": cut.dp_cp_rank,
        "errors": errors,
        "texts": [group.texts for group in groups],
        "logprobs": [[c.logprobs for c in answer] for _, answer in answers],
        "versions": {c.versions for _, answer in answers for c in answer},
    }


def scored(group: RolloutGroup) -> RolloutGroup:
    return RolloutGroup.of(
        group.prompt.token_ids,
        [c.token_ids for c in group.completions],
        [0.0] * len(group.completions),
        [c.logprobs for c in group.completions],
        [c.loss_mask or [1] * len(c.token_ids) for c in group.completions],
        uid=group.prompt.uid,
    )


def one_rank(rank: int, world_size: int, folder: Path) -> dict:
    return in_layouts(rank, world_size, {"x": SINGLE}, play, folder)["x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("episodes")
    (made / "game.py").write_text(GAME)
    return made


@pytest.fixture(scope="module")
def single(folder) -> dict:
    return spawn(one_rank, 1, folder)[0]


def test_each_token_is_of_the_model_or_of_the_environment(single):
    """Every episode is walked through, token by token, as the game and the template are written above: a turn is what
    the model sampled, mask 1; behind it stand [w0 where the turn ended by another token] w1, the number of words, w8
    and w2, mask 0. It ends by itself after a turn of 3 words, at w4, after 3 turns, or where nothing more fits."""
    ends = {"done": 0, "error": 0, "turns": 0, "limit": 0, "plain": 0}
    for group in single["told"]:
        for prompt, tokens, mask, truncated, outcome, turns in group:
            assert prompt[1] - 30 in range(8) and prompt[2:] in ([ASSISTANT], [9, ASSISTANT])
            if (prompt[1] - 30) % 4 == 3:
                ends["plain"] += 1
                assert outcome is None and mask is None and len(prompt) == 3
                continue
            assert len(prompt) == (4 if (prompt[1] - 30) % 2 == 0 else 3)  # " w9" of reset() in every other one
            mask = mask or [1] * len(tokens)
            place, starts, rewards, said, last, error = 0, [], [], [], 0, None
            for turn in range(outcome.turns):
                end = next((i for i in range(place, len(tokens)) if tokens[i] in STOPS), len(tokens) - 1)
                written = tokens[place : end + 1]
                assert mask[place : end + 1] == [1] * len(written)
                starts.append(place)
                said.append({"role": "assistant", "content": " ".join(f"w{token}" for token in written)})
                place = end + 1
                if 4 in written:
                    error = "raised ValueError: w4 (game.py, line 10)"
                    rewards.append(0.0)
                    break
                last = len(written)
                rewards.append(float(last) if last % 2 else 0.0)
                if turn < outcome.turns - 1:
                    between = [USER, 20 + len(written), 8, ASSISTANT]
                    between = between if written[-1] == END else [END, *between]
                    assert tokens[place : place + len(between)] == between
                    assert mask[place : place + len(between)] == [0] * len(between)
                    said.append({"role": "user", "content": f"w{20 + len(written)} w8"})
                    place += len(between)
            assert place == len(tokens) and tuple(said) == outcome.messages
            assert (outcome.error, turns) == (error, Turns(tuple(starts), tuple(rewards)))
            if not error:
                assert outcome.reward == sum(rewards) + 0.125
            cut = tokens[-1] not in STOPS
            why = "error" if error else "limit" if cut else "done" if last == 3 else "turns" if outcome.turns == TURNS \
                else "limit"  # fmt: skip
            # Of the ones that no answer fitted behind: at least 4 tokens, and one of the next turn.
            assert why != "limit" or cut or len(tokens) + (4 if tokens[-1] == END else 5) >= LIMIT
            assert truncated == (why == "limit" or (cut and why == "error"))
            ends[why] += 1
    assert ends["plain"] == 4 and ends["done"] >= 1 and ends["turns"] >= 1 and ends["limit"] >= 2


def test_training_agrees_with_the_log_probs_of_every_turn(single):
    """Those of the environment's tokens are 0, and stand for nothing."""
    assert max(single["errors"]) < 2e-5
    several = [turns for group in single["told"] for *_, turns in group if turns and len(turns.starts) > 1]
    assert any(0.0 in turns.rewards[:-1] for turns in several) and any(any(turns.rewards[1:]) for turns in several)
    for group, logprobs in zip(single["told"], single["logprobs"], strict=True):
        for (_, tokens, mask, *_), of_tokens in zip(group, logprobs, strict=True):
            assert len(of_tokens) == len(tokens)
            is_zero = [value == 0.0 for value in of_tokens]
            assert is_zero == [m == 0 for m in mask or [1] * len(tokens)]


def test_an_episode_has_the_version_of_its_turns(single):
    assert single["versions"] == {(VERSION,)}


def test_a_text_is_the_whole_of_the_episode(single):
    group, texts = single["told"][0], single["texts"][0]
    assert texts == [" ".join(f"w{token}" for token in tokens) for _, tokens, *_ in group]


def test_every_layout_plays_the_same_episodes(single, folder):
    results = spawn(in_layouts, 4, LAYOUTS, play, folder)
    for name in LAYOUTS:
        parts = {result[name]["place"]: result[name] for result in results}
        assert [group for place in sorted(parts) for group in parts[place]["told"]] == single["told"], name
        assert all(max(result[name]["errors"], default=0.0) < 2e-5 for result in results), name


def refused(rank: int, world_size: int, layout: Layout, folder: Path) -> str:
    with pytest.raises(RolloutError) as error:
        play(layout, folder)
    return str(error.value)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("' w9' * next(COUNT)", "prompt 0 (game): reset() said different things to responses that are compared"),
        ("' w9' * 9", "data.max_prompt_length = 8: prompt 0 (game) has 12 tokens with what reset() says. Give at"),
    ],
)
def test_what_reset_says_is_a_groups_own_and_short_enough(tmp_path, said, message):
    """On every rank alike, though one alone has asked."""
    (tmp_path / "game.py").write_text(
        "import itertools\nCOUNT = itertools.count()\nclass Game:\n"
        f"    def reset(self, level): return {said}\n    def step(self, text): return '', True\n"
    )
    assert all(message in text for text in spawn(refused, 2, Layout(1, 2, None, 1, 1), tmp_path))
