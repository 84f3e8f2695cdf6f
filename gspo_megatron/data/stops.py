"""What ends a response: the same for rollouts, evaluations and supervised examples.

Left out: the end-of-text token that transformers takes for a model whose files name none. Nobody wrote it down, and
another vocabulary has another token there.
"""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from gspo_megatron.config import TrainConfig
from gspo_megatron.config.constraints import require
from gspo_megatron.data.chat import turn_end
from gspo_megatron.recipe.hf_config import check_stop_ids, generation_stops


@dataclass(frozen=True)
class Stops:
    """A response ends with the first of these tokens, or where its text has one of these strings."""

    token_ids: tuple[int, ...]
    strings: tuple[str, ...] = ()

    def described(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """Return them in words, for people."""
        names = tokenizer.convert_ids_to_tokens(list(self.token_ids))
        tokens = [f"{token} {name}" for token, name in zip(self.token_ids, names, strict=True)]
        return ", ".join([*tokens, *(repr(text) for text in self.strings)])


def find_stops(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Stops:
    """Return the union of what the tokenizer, its chat template, the folder to start from and the recipe name.

    Args:
        vocab_size: of the model.

    Raises:
        ConfigError: none of them names one, or the recipe names one that the model does not have.
    """
    check_stop_ids(config.rollout, vocab_size)
    named = {tokenizer.eos_token_id, *generation_stops(config.model), *config.rollout.stop_token_ids}
    if tokenizer.chat_template is not None:
        named.add(turn_end(tokenizer))
    stops = Stops(tuple(sorted(token for token in named if token is not None)), config.rollout.stop)
    require(
        bool(stops.token_ids or stops.strings),
        "tokenizer.eos_token",
        None,
        "nothing ends a response",
        "Set eos_token in tokenizer_config.json, or rollout.stop_token_ids.",
    )
    return stops
