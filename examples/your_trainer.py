"""A training loop of one's own: transformers generates on rank 0, GspoTrainer learns on all ranks.

    torchrun --nproc-per-node 2 examples/your_trainer.py MODEL_FOLDER

Each step samples, rewards, learns, and puts the new weights into the model that samples, as a loop around an inference
server would. The reward is for the letter e.
"""

import sys

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

from gspo_megatron import GspoTrainer, RolloutGroup

RECIPE = "examples/recipes/your_trainer.yaml"
PROMPTS = ("Say cheese.", "Who is there?", "Tell me more.")


def sampled(generator, tokenizer, prompt: str) -> RolloutGroup:
    """Eight responses to a prompt, and the share of the letter e in each."""
    ids = tokenizer.encode(prompt)
    out = generator.generate(
        torch.tensor([ids] * 8), do_sample=True, max_new_tokens=16, pad_token_id=tokenizer.pad_token_id
    )
    texts = [tokenizer.decode(row[len(ids) :]) for row in out]
    return RolloutGroup.of(ids, [row[len(ids) :].tolist() for row in out], [t.count("e") / 16 for t in texts])


def main(folder: str, steps: int = 3) -> None:
    trainer = GspoTrainer(RECIPE, model=folder)
    is_first, tokenizer = dist.get_rank() == 0, AutoTokenizer.from_pretrained(folder)
    if is_first:
        generator = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        sampling_weights = generator.state_dict()
        torch.manual_seed(1)
    for _ in range(steps):
        groups = [sampled(generator, tokenizer, prompt) for prompt in PROMPTS] if is_first else []
        metrics = trainer.step(groups)
        for name, tensor in trainer.weights(is_stacked=True):  # every rank takes part
            if is_first:
                sampling_weights[name].copy_(tensor)
        if is_first:
            print(f"version {trainer.version}: reward {metrics['reward/mean']:.3f}, loss {metrics['loss']:.2e}")
    trainer.close()


if __name__ == "__main__":
    main(sys.argv[1])
