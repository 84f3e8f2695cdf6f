"""Time and memory of a conversion, beside a plain copy of the files: `python tools/bench_conversion.py --folder /tmp/x`

The model is a Qwen3-MoE of random numbers in bf16. Each way runs in a process of its own, whose resident memory is
watched all the time, without pages of files that it has mapped: those are the system's to take back. What the imports
alone take is the first row. Linux only.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {"model_type": "qwen3_moe", "hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 16,
          "num_key_value_heads": 4, "head_dim": 64, "intermediate_size": 3072, "moe_intermediate_size": 768,
          "num_experts": 32, "num_experts_per_tok": 4, "vocab_size": 32768, "max_position_embeddings": 512}  # fmt: skip
PROGRAM = """
import re, sys, threading, time
from gspo_megatron.hf import convert
peak, done = 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.01):
        peak = max(peak, int(re.search("RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]))
watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
time.sleep(0.1)
began = time.perf_counter()
{call}
seconds = time.perf_counter() - began
done.set()
watcher.join()
print(seconds, peak / 1e6)
"""
TO = "convert.to_megatron(convert.Path({!r}), convert.Path({!r}), None, False, lambda done, total: None)"
BACK = "convert.to_hugging_face(convert.Path({!r}), convert.Path({!r}), None, False, lambda done, total: None)"


def main(folder: Path, layers: int = CONFIG["num_hidden_layers"]) -> int:
    """Measure.

    Args:
        folder: where to work; needs room for four copies of the model (1.3 GB each with 8 layers).
        layers: of the model.
    """
    config = CONFIG | {"num_hidden_layers": layers}
    with tempfile.TemporaryDirectory(dir=folder, prefix="bench_conversion_") as name:
        work = Path(name)
        size = write_random(work / "hf", config)
        print(f"{size / 1e9:.2f} GB of weights")
        _, base = measured("pass")
        began = time.perf_counter()
        shutil.copytree(work / "hf", work / "copy")
        subprocess.run(["sync", "-f", str(work)], check=True)
        copy = time.perf_counter() - began
        shutil.rmtree(work / "copy")
        rows = [("to Megatron", *measured(TO.format(str(work / "hf"), str(work / "megatron"))))]
        rows += [("to Hugging Face", *measured(BACK.format(str(work / "megatron"), str(work / "back"))))]
    print(f"{'imports alone':16} {'':>8} peak memory {base:5.2f} GB")
    print(f"{'copy, synced':16} {copy:6.2f} s, {size / copy / 1e9:5.2f} GB/s")
    for label, seconds, peak in rows:
        speed = f"{size / seconds / 1e9:5.2f} GB/s = {copy / seconds:4.0%} of the copy"
        print(f"{label:16} {seconds:6.2f} s, {speed}, peak memory {peak:5.2f} GB")
    return 0


def write_random(folder: Path, config: dict) -> int:
    """A Hugging Face folder of random weights; returns their bytes."""
    from gspo_megatron.backend import model, runtime, streaming, topology
    from gspo_megatron.config import ModelConfig, ParallelConfig
    from gspo_megatron.hf import export, table
    from gspo_megatron.hf.safetensors import SafetensorsWriter

    # isort: split
    import torch

    started = runtime.start("cpu")
    cut = topology.start(ParallelConfig(1, 1, None, 1, 1), seed=0)
    shape = model.ModelShape(config, config["vocab_size"])
    bare = model.bare(shape, ModelConfig(), cut, started, torch.bfloat16)[0]
    entries = table.entries(shape.architecture)
    held = {p.name: export.Held(p.full_shape, None, torch.bfloat16, (0,)) for p in streaming.stored(bare, cut)}
    specs = export.specs(entries, held, shape.architecture, None)
    with SafetensorsWriter(folder, specs, export.MAX_SHARD_SIZE) as writer:
        writer.add("config.json", json.dumps(config).encode())
        for pieces in table.tensors(entries).values():
            spec = next(s for s in specs if s.name == pieces[0].tensor)
            writer.write(pieces[0], torch.randn(spec.shape).bfloat16())
        writer.finish()
    topology.stop()
    runtime.stop()
    return sum(spec.size for spec in specs)


def measured(call: str) -> tuple[float, float]:
    """Seconds and peak of resident memory in GB of one call in a fresh process."""
    command = [sys.executable, "-c", PROGRAM.format(call=call)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    seconds, peak = done.stdout.split()[-2:]
    return float(seconds), float(peak)


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
