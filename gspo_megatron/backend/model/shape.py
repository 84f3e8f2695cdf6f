"""What the model is built from: a Hugging Face config, and the vocabulary that its tokenizer asks for."""

from dataclasses import dataclass
from pathlib import Path

from gspo_megatron.config import ModelConfig
from gspo_megatron.config.constraints import require
from gspo_megatron.config.model import MAKE_VOCAB_SIZE_DIVISIBLE_BY
from gspo_megatron.models.architecture import Architecture
from gspo_megatron.models.families import architecture
from gspo_megatron.recipe.hf_config import read_json


@dataclass(frozen=True)
class ModelShape:
    """A Hugging Face config with the vocabulary that the model is built with."""

    hf: dict
    vocab_size: int

    @classmethod
    def load(cls, path: Path, tokenizer_size: int) -> "ModelShape":
        """Describe a model to be trained from random weights: its vocabulary is the tokenizer's, padded."""
        hf = read_json(path, "model.hf_config")
        padded = -(-tokenizer_size // MAKE_VOCAB_SIZE_DIVISIBLE_BY) * MAKE_VOCAB_SIZE_DIVISIBLE_BY
        return cls(hf | {"vocab_size": padded}, padded)

    @classmethod
    def of_folder(cls, folder: Path) -> "ModelShape":
        """Describe a model whose weights are in a Hugging Face folder: its vocabulary is the embedding's, without
        padding, because rows that the weights do not have would take a share of the softmax."""
        hf = read_json(folder / "config.json", "model.load_hf")
        return cls(hf, hf["vocab_size"])

    @classmethod
    def of(cls, model: ModelConfig, tokenizer_size: int) -> "ModelShape":
        """Describe the model of a recipe.

        Args:
            tokenizer_size: the largest id of its tokenizer and one more (data/tokenizer.py: size_of).

        Raises:
            ConfigError: the tokenizer of the folder to start from has ids that its embedding lacks.
        """
        if model.load_hf is None:
            return cls.load(model.hf_config, tokenizer_size)
        shape = cls.of_folder(model.load_hf)
        require(
            tokenizer_size <= shape.vocab_size,
            "model.load_hf",
            str(model.load_hf),
            f"its tokenizer gives ids up to {tokenizer_size - 1}, and its embedding has {shape.vocab_size} rows",
            "Give the model's own tokenizer.",
        )
        return shape

    @property
    def architecture(self) -> Architecture:
        return architecture(self.hf | {"vocab_size": self.vocab_size})

    def num_parameters(self) -> int:
        """Count the parameters of the whole model, from the config."""
        return self.architecture.num_parameters
