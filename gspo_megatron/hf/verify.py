"""Do a Hugging Face folder and a Megatron checkpoint hold the same model? Compares their logits on given prompts.

Both models are whole in memory here, in fp32, one after the other. Left out: other layouts than one process
(tools/validation/conversion_matrix.py), and families that transformers cannot run.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from gspo_megatron.backend.checkpoint import streaming
from gspo_megatron.backend.layers.attention import PackedPlan
from gspo_megatron.backend.model.shape import ModelShape
from gspo_megatron.data.tokenizer import load_tokenizer
from gspo_megatron.errors import ConfigError, ConversionError
from gspo_megatron.hf.convert import whole_model


@dataclass(frozen=True)
class Difference:
    """The two models' logits of one prompt differ by this."""

    prompt: str
    tokens: int
    largest: float  # absolute difference, over all tokens and the vocabulary
    scale: float  # largest absolute logit
    same_choices: bool  # the most likely next token is the same after each token


def compare(folder: Path, checkpoint: Path, prompts: tuple[str, ...]) -> list[Difference]:
    """Compare logits of transformers' model in `folder` with those of Megatron's in `checkpoint`, a row a prompt.

    Raises:
        ConversionError: the folder has no tokenizer, or a prompt has no tokens or more than the model has positions.
    """
    from transformers import AutoModelForCausalLM

    try:
        tokenizer = load_tokenizer(folder)
    except ConfigError as error:
        raise ConversionError(f"{folder}: prompts need its tokenizer, which cannot be read ({error}).") from None
    texts = [torch.tensor(tokenizer.encode(prompt)) for prompt in prompts]
    limit = ModelShape.of_folder(folder).architecture.max_position_embeddings
    for prompt, tokens in zip(prompts, texts, strict=True):
        if not len(tokens):
            raise ConversionError(f"--verify {prompt!r}: has no tokens. Give a text.")
        if len(tokens) > limit:
            raise ConversionError(
                f"--verify {prompt[:60]!r}: has {len(tokens)} tokens, more than the model's max_position_embeddings "
                f"{limit}. Give a shorter text."
            )
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    ).eval()
    with torch.no_grad():
        theirs = [model(tokens[None]).logits[0] for tokens in texts]
    del model
    ours = megatron_logits(folder, checkpoint, texts)
    found = []
    for prompt, a, b in zip(prompts, theirs, ours, strict=True):
        same = torch.equal(a.argmax(1), b.argmax(1))
        found.append(Difference(prompt, len(a), float((a - b).abs().max()), float(a.abs().max()), same))
    return found


@torch.no_grad()
def megatron_logits(folder: Path, checkpoint: Path, texts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Compute [T, V] fp32 of each text, by a model in fp32 whatever the checkpoint's type.

    Args:
        folder: has the model's config.json.
        texts: token ids, [T] int64 each.
    """
    shape = ModelShape.of_folder(folder)
    weights = streaming.StoredWeights(checkpoint)
    with whole_model(shape, weights.dtype, is_alone=True) as (model, topology):
        loaded = weights.load(model, topology)
        full = {name: torch.cat(blocks).to(torch.float32) for name, blocks in loaded}
        for parameter in streaming.stored(model, topology):
            parameter.local.data = full.pop(parameter.name)
        found = []
        for tokens in texts:
            plan = PackedPlan.from_cu_seqlens(torch.tensor([0, len(tokens)], dtype=torch.int32))
            places = torch.arange(len(tokens))[None]
            found.append(model(tokens[None], places, None, packed_seq_params=plan))
        return found
