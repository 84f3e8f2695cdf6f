"""Time and memory of a conversion, beside a copy by safetensors alone: `python -m tools.benchmarks.convert`

The model is a Qwen3-MoE of random numbers in bf16. The copy is load_file and save_file of the same files. Each of the
three runs in a process of its own, in turns, and is timed until its files are on the disk, without the imports.
Resident memory is watched all the time, without pages of files that are mapped: those are the system's to take back.
What the imports alone take is the first row. Linux only.

Exit status: 0 when both ways have at least 70% of the copy's speed, by the ratio of medians, else 1.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[2]
CONFIG = {
    "model_type": "qwen3_moe",
    "hidden_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 3072,
    "moe_intermediate_size": 768,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "vocab_size": 32768,
    "max_position_embeddings": 512,
}
PROGRAM = """
import re, subprocess, sys, threading, time
import safetensors.torch
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
subprocess.run(["sync", "-f", "{work}"], check=True)
seconds = time.perf_counter() - began
done.set()
watcher.join()
print(seconds, peak / 1e6)
"""
TO = "convert.to_megatron(convert.Path({!r}), convert.Path({!r}), None, False, lambda done, total: None)"
BACK = "convert.to_hugging_face(convert.Path({!r}), convert.Path({!r}), None, False, lambda done, total: None)"
COPY = """
from pathlib import Path
from safetensors.torch import load_file, save_file
Path({1!r}).mkdir()
for file in Path({0!r}).glob("*.safetensors"):
    save_file(load_file(file), Path({1!r}) / file.name)
"""
LIMIT = 0.7
TEMPORARY = Path(tempfile.gettempdir())


def main(folder: Path = TEMPORARY, layers: int = 12, rounds: int = 6) -> int:
    """Measure.

    Args:
        folder: where to work; needs room for four copies of the model (2 GB each with 12 layers).
        layers: of the model.
        rounds: of all three.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix="bench_convert_") as name:
        work = Path(name)
        size = write_random(work / "hf", CONFIG | {"num_hidden_layers": layers})
        subprocess.run(["sync", "-f", name], check=True)
        print(f"{size / 1e9:.2f} GB of weights")
        print(f"{'imports alone':16} {'':>8} peak memory {measured('pass', work)[1]:5.2f} GB", flush=True)
        ways = {
            "copy": (COPY, "hf", "copy"),
            "to Megatron": (TO, "hf", "megatron"),
            "to Hugging Face": (BACK, "megatron", "back"),
        }
        found: dict[str, list[tuple[float, float]]] = {label: [] for label in ways}
        for _ in range(rounds):
            for label, (call, source, target) in ways.items():
                shutil.rmtree(work / target, ignore_errors=True)
                subprocess.run(["sync", "-f", name], check=True)  # the disk's work for the last turn is not this one's
                found[label].append(measured(call.format(str(work / source), str(work / target)), work))
    medians = {label: statistics.median(seconds for seconds, _ in runs) for label, runs in found.items()}
    for label, runs in found.items():
        share = medians["copy"] / medians[label]
        print(
            f"{label:16} {medians[label]:6.2f} s ({min(runs)[0]:.2f} to {max(runs)[0]:.2f}), "
            f"{size / medians[label] / 1e9:5.2f} GB/s = {share:4.0%} of the copy, peak memory "
            f"{max(peak for _, peak in runs):5.2f} GB"
        )
    return 0 if medians["copy"] >= LIMIT * max(medians.values()) else 1


def write_random(folder: Path, config: dict) -> int:
    """A Hugging Face folder of random weights; returns their bytes."""
    from gspo_megatron.backend.checkpoint import streaming
    from gspo_megatron.backend.model import builder
    from gspo_megatron.backend.model.shape import ModelShape
    from gspo_megatron.backend.parallel import runtime, topology
    from gspo_megatron.config import Layout, ModelConfig
    from gspo_megatron.hf import export
    from gspo_megatron.hf.safetensors_writer import SafetensorsWriter
    from gspo_megatron.models import table

    # isort: split
    import torch

    started = runtime.init_process_group("cpu")
    cut = topology.initialize_model_parallel(Layout(1, 1, None, 1, 1), seed=0)
    shape = ModelShape(config, config["vocab_size"])
    bare = builder.bare(shape, ModelConfig(), cut, started, torch.bfloat16)[0]
    entries = table.entries(shape.architecture)
    held = {p.name: export.Held(p.full_shape, None, torch.bfloat16, (0,)) for p in streaming.stored(bare, cut)}
    specs = export.specs(entries, held, shape.architecture, None)
    with SafetensorsWriter(folder, specs, export.MAX_SHARD_SIZE) as writer:
        writer.add("config.json", json.dumps(config).encode())
        for pieces in table.tensors(entries).values():
            spec = next(s for s in specs if s.name == pieces[0].tensor)
            writer.write(pieces[0], torch.randn(spec.shape).bfloat16())
        writer.finish()
    topology.destroy_model_parallel()
    runtime.destroy_process_group()
    return sum(spec.size for spec in specs)


def measured(call: str, work: Path) -> tuple[float, float]:
    """Seconds until all is on the disk, and peak of resident memory in GB, of one call in a fresh process."""
    program = PROGRAM.replace("{call}", call).replace("{work}", str(work))
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    seconds, peak = done.stdout.split()[-2:]
    return float(seconds), float(peak)


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
