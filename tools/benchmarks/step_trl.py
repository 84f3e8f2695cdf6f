"""TRL's side of step.py: one process, in an environment of its own that has trl and nothing of this package.

    python step_trl.py WORK.json

WORK.json is what step.py writes. Prints one line of JSON a step: CPU seconds of generate, of the old log-probs'
pass and of everything else. Rewards are drawn so that each group has spread; no response ends early.
"""

import json
import sys
import tempfile
import time
from collections import defaultdict

import torch
from datasets import Dataset
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl import GRPOConfig, GRPOTrainer


class Clock:
    """CPU seconds of this process, by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def timed(self, name: str, call):
        """Wrap a function, so that its time counts as a part."""

        def wrapper(*args, **kwargs):
            began = time.process_time()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds[name] += time.process_time() - began

        return wrapper


def words(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of `size` words, and one more, which the model has not, to end and to pad."""
    vocabulary = {f"w{i}": i for i in range(size)} | {"<end>": size}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def spread(completions, **columns) -> list[float]:
    """Rewards that differ within every group of neighbours."""
    return [float(i * 7 % 5) + 0.1 * i for i in range(len(completions))]


def trainer_of(work: dict, steps: int, folder: str) -> GRPOTrainer:
    """A GRPOTrainer that makes `steps` steps of the work, each of one rollout batch and all its minibatches."""
    model = Qwen3MoeForCausalLM._from_config(
        Qwen3MoeConfig(**work["config"]),
        attn_implementation="sdpa",
        experts_implementation="grouped_mm",
        dtype=torch.float32,
    )
    minibatches = work["num_minibatches"]
    arguments = GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=work["sequences"] // minibatches,
        gradient_accumulation_steps=1,
        steps_per_generation=minibatches,
        num_generations=work["group_size"],
        max_completion_length=work["new_tokens"],
        max_steps=steps * minibatches,
        loss_type="grpo",  # a mean over sequences, as GSPO has it
        importance_sampling_level="sequence",
        epsilon=3e-4,
        epsilon_high=4e-4,
        beta=0.0,
        temperature=1.0,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        shuffle_dataset=False,
    )
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, work["config"]["vocab_size"], (64, work["prompt_tokens"]), generator=generator)
    rows = Dataset.from_list([{"prompt": " ".join(f"w{i}" for i in row)} for row in prompts.tolist()])
    tokenizer = words(work["config"]["vocab_size"])
    return GRPOTrainer(model, spread, args=arguments, train_dataset=rows, processing_class=tokenizer)


def main() -> None:
    with open(sys.argv[1]) as file:
        work = json.load(file)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(work, work["steps"] + 2, folder)
        clock, ends = Clock(), []
        make, logps = trainer._generate_and_score_completions, trainer._get_per_token_logps_and_entropies

        def whole(*args, **kwargs):
            ends.append((time.process_time(), dict(clock.seconds)))
            trainer._get_per_token_logps_and_entropies = clock.timed("old", logps)
            try:
                return make(*args, **kwargs)
            finally:
                trainer._get_per_token_logps_and_entropies = logps

        trainer._generate_and_score_completions = whole
        trainer._generate = clock.timed("rollout", trainer._generate)
        trainer.train()
    for (begin, before), (end, after) in zip(ends[1:], ends[2:], strict=False):  # the first step warms up
        parts = {name: after.get(name, 0.0) - before.get(name, 0.0) for name in ("rollout", "old")}
        print(json.dumps(parts | {"update": end - begin - sum(parts.values())}), flush=True)


if __name__ == "__main__":
    main()
