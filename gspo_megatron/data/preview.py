"""What a model will see of a recipe's tasks: prompts as text and tokens, what of an example is trained, how long they
are, and how many are left out. Nothing is trained, and no process group exists."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from gspo_megatron.batch import TaskItem
from gspo_megatron.config import TrainConfig
from gspo_megatron.data.prompts import PromptSource
from gspo_megatron.data.stops import find_stops
from gspo_megatron.data.tokenizer import build_tokenizer
from gspo_megatron.data.turns import check_histories
from gspo_megatron.recipe.check import check_rewards
from gspo_megatron.tasks.mixture import TaskMixture

ANY_TOKEN = 2**31  # how many the model knows is looked at when it is built
MEASURED = 1000  # prompts of each task and split, at most


@dataclass(frozen=True)
class Lengths:
    """How long the first prompts of a split are, in tokens, the chat template included."""

    task: str
    split: str
    rows: int | None  # of the split; None: there is no end
    tokens: list[int]  # ascending

    def at(self, share: float) -> int:
        """Return the length that this share of the prompts do not exceed."""
        return self.tokens[min(int(share * len(self.tokens)), len(self.tokens) - 1)]


@dataclass(frozen=True)
class Shown:
    """One prompt as the model sees it."""

    item: TaskItem
    prompt: list[str]  # its tokens, as text
    response: list[str]  # those of the gold answer; empty where there is none
    is_trained: list[bool]  # of each of them, in the warm start; what an environment says is not


@dataclass(frozen=True)
class Preview:
    """All of a recipe's tasks."""

    notes: list[str]
    lengths: list[Lengths]
    shown: list[Shown]


def preview(config: TrainConfig, rows: int, split: str) -> Preview:
    """Return what the tasks of a recipe give.

    Args:
        rows: prompts of each task that are shown.
        split: of those prompts, train, warm_start or eval.

    Raises:
        ConfigError, RolloutError: as the training would, for what it cannot use.
    """
    mixture = TaskMixture(config.tasks, config.seed)
    tokenizer = build_tokenizer(config, mixture)
    source = PromptSource(mixture, tokenizer, "train", config.data.max_prompt_length)
    notes = [note for task in mixture.data.values() for note in task.notes()]
    notes += check_rewards(config, mixture)
    check_histories(config, tokenizer, mixture)
    notes += source.hold_to_limit(config.tasks, source.row_lengths())
    lengths = [_lengths(source, name, split) for name in mixture.names for split in ("train", "eval")]
    stops = find_stops(config, tokenizer, ANY_TOKEN).token_ids
    asked = [item for name in mixture.names for item in _items(mixture, name, split, rows)]
    return Preview(notes, lengths, [_shown(source, tokenizer, item, stops) for item in asked])


def _items(mixture: TaskMixture, name: str, split: str, most: int) -> list[TaskItem]:
    """The first items of a task, each row of data once."""
    size = mixture.tasks[name].size(split)
    number = most if size is None else min(most, size)
    return [mixture.as_asked(mixture.tasks[name].item(split, index)) for index in range(number)]


def _lengths(source: PromptSource, name: str, split: str) -> Lengths:
    items = _items(source.mixture, name, split, MEASURED)
    tokens = sorted(source.length(item) for item in items)
    return Lengths(name, split, source.mixture.tasks[name].size(split), tokens)


def _shown(source: PromptSource, tokenizer: PreTrainedTokenizerBase, item: TaskItem, stops: tuple[int, ...]) -> Shown:
    def texts(token_ids: list[int]) -> list[str]:
        return [str(tokenizer.decode([token])) for token in token_ids]

    if not item.has_answer:
        return Shown(item, texts(source.encode_prompt(item)), [], [])
    example = source.encode_example(item, stops)
    cut = example.prompt_length
    mask = [bool(one) for one in example.loss_mask or [1] * example.response_length]
    return Shown(item, texts(example.token_ids[:cut]), texts(example.token_ids[cut:]), mask)
