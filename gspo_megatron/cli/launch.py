"""This decides how many ranks a command runs on, and starts them by torchrun. Nothing here imports torch.

Started without torchrun, `train` and `doctor` check everything first and then start torchrun on this machine with the
same command line: one rank a GPU, four on a CPU, or NPROC of them. Inside a rank every process checks for itself (that
is cheaper than a broadcast) and rank 0 alone prints.

Left out: several machines without Slurm (call torchrun yourself; the ranks only need its environment variables).
"""

import ctypes
import importlib.metadata
import os
import sys
from pathlib import Path

from gspo_megatron.config import Layout, TrainConfig
from gspo_megatron.config.constraints import require
from gspo_megatron.process import lifecycle
from gspo_megatron.recipe.layout import resolve_layout

CPU_RANKS = 4
# torchrun gives 1 for every status of a rank, and an account of each failure. Where a rank has said all there is in one
# message, its status is passed on without that account.
TORCHRUN = """
import logging, sys
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main
quiet = {quiet}
def is_news(record):
    text = record.getMessage()
    return "closing signal" not in text and not any(f"(exitcode: {{status}})" in text for status in quiet)
logging.getLogger("torch.distributed.elastic.multiprocessing.api").addFilter(is_news)
try:
    main()
except ChildFailedError as error:
    status = error.get_first_failure()[1].exitcode
    if status not in quiet:
        raise
    sys.exit(status)
"""
OF_A_RUN = (lifecycle.BAD_INPUT, lifecycle.REQUEUE)  # one message was printed
OF_A_DIAGNOSIS = (lifecycle.DEFECT, lifecycle.BAD_INPUT)  # 1 too: a diagnosis that is bad is no failure of a rank


def gpu_count() -> int:
    """Count GPUs that torch could use, without importing torch: by NVML, CUDA_VISIBLE_DEVICES and the build of
    torch."""
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


def layout_of(config: TrainConfig) -> tuple[Layout, int]:
    """Return every size of the layout filled in, and the number of ranks there are or will be."""
    gpus = gpu_count()
    use_cuda = config.device != "cpu" and gpus > 0
    if "RANK" in os.environ:
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
    else:
        world_size = _ranks_to_start(gpus if use_cuda else CPU_RANKS)
    layout = resolve_layout(config, world_size, has_cuda=gpus > 0)
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size)))
    require(
        not use_cuda or local_ranks <= gpus,
        "ranks on this machine",
        local_ranks,
        f"there are {gpus} GPUs, and NCCL needs one for each rank",
        f"Start {gpus} ranks, or give --device cpu.",
    )
    return layout, world_size


def _ranks_to_start(default: int) -> int:
    given = os.environ.get("NPROC", str(default))
    require(
        given.isascii() and given.isdigit() and int(given) > 0,
        "NPROC",
        given,
        "must be a whole number above 0",
        f"Unset it for {default} ranks.",
    )
    return int(given)


def become_ranks(config: TrainConfig, count: int, quiet: tuple[int, ...] = OF_A_RUN) -> None:
    """Become torchrun, which runs this same command line once a rank; inside a rank only hide the GPUs that the recipe
    does not want.

    Args:
        quiet: exit statuses of ranks that are passed on without torchrun's account.

    Raises:
        ConfigError: called from Python, outside torchrun, where the process is not ours to replace.
    """
    if config.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: Megatron uses any GPU it can see
    if "RANK" in os.environ:
        return
    require(
        lifecycle.owns_process(),
        "ranks",
        count,
        "a call from Python starts none, because this process would become torchrun",
        "Run gspo-megatron, or python -m gspo_megatron.cli, as a process of its own, or call under torchrun.",
    )
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.stdout.flush()
    command = sys.argv
    if Path(sys.argv[0]).resolve() == Path(__file__).resolve().with_name("__main__.py"):
        # torchrun would put this folder into sys.path, where its files hide modules of the same names.
        command = ["-m", "gspo_megatron.cli", *sys.argv[1:]]
    torchrun = TORCHRUN.format(quiet=quiet)
    os.execv(sys.executable, [sys.executable, "-c", torchrun, "--nproc-per-node", str(count), *command])
