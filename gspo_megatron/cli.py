"""The command `gspo-megatron`: reads and checks a recipe, starts the ranks, and hands over to what each of them runs.

Started without torchrun, `train` and `doctor` check everything first and then start torchrun on this machine with the
same command line: one rank a GPU, four on a CPU, or NPROC of them. Inside a rank every process checks for itself (that
is cheaper than a broadcast) and rank 0 alone prints. torch is imported only after all checks have passed.

Left out: several machines without Slurm (call torchrun yourself; the ranks only need its environment variables), and
the subcommands eval, plan and report.
"""

import ctypes
import importlib.metadata
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gspo_megatron import process

if TYPE_CHECKING:
    from gspo_megatron.config import ParallelConfig, TrainConfig

USAGE = """\
usage: gspo-megatron train [RECIPE.yaml] [--some.override VALUE ...]
       gspo-megatron doctor --noise-floor [RECIPE.yaml] [--some.override VALUE ...]
       gspo-megatron convert SOURCE TARGET [--dtype bf16 ...]
       gspo-megatron upcycle SOURCE TARGET [--experts 8 ...]
       gspo-megatron slurm RECIPE.yaml --nodes N [--some.override VALUE ...]
       gspo-megatron study routing-replay [--seeds 5 ...]
       torchrun --no-python --nproc-per-node N gspo-megatron train [RECIPE.yaml] [--some.override VALUE ...]

train   train a MoE model with GSPO or one of its relatives; `gspo-megatron train --help` lists every override
doctor  measure how far the sequence ratio is from 1 at unchanged weights, beside the recipe's clip range
convert Hugging Face folder to Megatron checkpoint, or back; `gspo-megatron convert --help` lists the options
upcycle dense Hugging Face folder to a MoE whose experts are copies; `gspo-megatron upcycle --help` lists the options
slurm   write a batch script for a recipe, checked against its nodes; `gspo-megatron slurm --help` lists the options
study   does GSPO need routing replay? trains arms from the same starts and writes a report; `study --help` tells more

Without torchrun it starts its own ranks on this machine: one a GPU, 4 on a CPU, or NPROC of them."""

CPU_RANKS = 4
# A diagnosis that is bad is no failure of a rank: its exit status is passed on, without torchrun's account of it.
QUIET_TORCHRUN = """
import logging, sys
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main
logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
try:
    main()
except ChildFailedError as error:
    sys.exit(max(1, *(failure.exitcode for failure in error.failures.values())))
"""


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script. Returns the exit status of what ends normally."""
    argv = sys.argv[1:] if argv is None else argv
    commands = {"train": _train, "doctor": _doctor, "convert": _convert, "upcycle": _upcycle, "slurm": _slurm,
                "study": _study}  # fmt: skip
    if argv[:1] in (["-h"], ["--help"]):
        if process.rank() == 0:
            print(USAGE)
        return 0
    with process.guard():
        if not argv or argv[0] not in commands:
            problem = f"unknown command {argv[0]!r}" if argv else "no command given"
            if process.rank() == 0:
                print(f"error: {problem}\n{USAGE}", file=sys.stderr)
            raise SystemExit(process.BAD_INPUT)
        return commands[argv[0]](argv[1:])


def gpu_count() -> int:
    """GPUs that torch could use, without importing torch: by NVML, CUDA_VISIBLE_DEVICES and the build of torch."""
    if importlib.metadata.version("torch").endswith("+cpu"):
        return 0
    count = ctypes.c_uint(0)
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return 0
    if nvml.nvmlInit_v2() != 0 or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return count.value
    named = [name for name in visible.split(",") if name.strip() not in ("", "-1")]
    return min(count.value, len(named))


def _train(argv: list[str]) -> int:
    from gspo_megatron import advice, check, recipe

    config = recipe.load(argv, quiet=process.rank() != 0)
    layout, world_size = _layout(config)
    check.check(config, layout, world_size)
    if "RANK" not in os.environ:
        _start_ranks(world_size, [sys.executable, "-m", "torch.distributed.run"])
    if process.rank() == 0:
        for sentence in advice.warnings(config):
            print(f"warning: {sentence}", file=sys.stderr)
    _hide_gpus(config)
    from gspo_megatron.train import train

    train(config, layout)
    return 0


def _doctor(argv: list[str]) -> int:
    """Exit status 1 where the recipe relies on something too noisy, on every rank."""
    from gspo_megatron import check, doctor, recipe

    options, rest = doctor.parse(argv, quiet=process.rank() != 0)
    config = recipe.load(rest, quiet=process.rank() != 0, program=doctor.PROGRAM)
    doctor.check_algorithm(config)
    layout, world_size = _layout(config)
    check.check(config, layout, world_size)
    stages = layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size
    doctor.check_prompts(options, world_size // stages)
    if "RANK" not in os.environ:
        _start_ranks(world_size, [sys.executable, "-c", QUIET_TORCHRUN])
    _hide_gpus(config)
    from gspo_megatron.noise_floor import measure

    diagnosis = doctor.diagnose(measure(config, layout, options.num_prompts, options.checkpoint), options, config)
    if process.rank() == 0:
        doctor.report(diagnosis, options)
    return int(not diagnosis.is_healthy)


def _convert(argv: list[str]) -> int:
    from gspo_megatron import convert

    return convert.main(argv)


def _upcycle(argv: list[str]) -> int:
    from gspo_megatron import upcycle

    return upcycle.main(argv)


def _slurm(argv: list[str]) -> int:
    from gspo_megatron import slurm

    return slurm.main(argv)


def _study(argv: list[str]) -> int:
    from gspo_megatron.study import command

    return command.main(argv)


def _layout(config: "TrainConfig") -> "tuple[ParallelConfig, int]":
    """Every size of the layout filled in, and the number of ranks there are or will be."""
    from gspo_megatron import check

    gpus = gpu_count()
    use_cuda = config.device != "cpu" and gpus > 0
    if "RANK" in os.environ:
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
    else:
        world_size = _ranks_to_start(gpus if use_cuda else CPU_RANKS)
    layout = check.resolve_layout(config, world_size, has_cuda=gpus > 0)
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size)))
    check.require(not use_cuda or local_ranks <= gpus, "ranks on this machine", local_ranks,
                  f"there are {gpus} GPUs, and NCCL needs one for each rank",
                  f"Start {gpus} ranks, or give --device cpu.")  # fmt: skip
    return layout, world_size


def _hide_gpus(config: "TrainConfig") -> None:
    """Before torch is imported: Megatron uses any GPU it can see."""
    if config.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _ranks_to_start(default: int) -> int:
    from gspo_megatron.config import require

    given = os.environ.get("NPROC", str(default))
    require(given.isdigit() and int(given) > 0, "NPROC", given, "must be a whole number above 0",
            f"Unset it for {default} ranks.")  # fmt: skip
    return int(given)


def _start_ranks(count: int, torchrun: list[str]) -> None:
    """Become torchrun, which runs this same command line once a rank. Does not return."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.stdout.flush()
    command = sys.argv
    if Path(sys.argv[0]).resolve() == Path(__file__).resolve():  # python -m gspo_megatron.cli
        # torchrun would put the folder of that script into sys.path, where this package's types.py hides Python's.
        command = ["-m", "gspo_megatron.cli", *sys.argv[1:]]
    os.execv(sys.executable, [*torchrun, "--nproc-per-node", str(count), *command])


if __name__ == "__main__":
    sys.exit(main())
