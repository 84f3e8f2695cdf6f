"""A Slurm job is described here, and checked against its recipe before it waits in a queue."""

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from gspo_megatron.config import Layout, TrainConfig
from gspo_megatron.config.constraints import require
from gspo_megatron.config.names import LONGEST_NAME, check_path, check_run_name, check_word
from gspo_megatron.config.options import check_options

TIME = re.compile(r"(?:(?:([0-9]{1,4})-)?([0-9]{1,6}):)?([0-9]{1,8}):([0-9]{2})")  # [days-][hours:]minutes:seconds

SEEDS = r"[0-9]+(-[0-9]+(:[0-9]+)?)?(,[0-9]+(-[0-9]+(:[0-9]+)?)?)*(%[0-9]+)?"  # as sbatch takes an array
OPTION = r"[a-z][a-z0-9-]*(=[\w.,:;/@%+=&|*()\[\]{}-]*)?"  # a long option of sbatch; its value may be a constraint


@dataclass(frozen=True)
class Job:
    """Write a Slurm batch script that trains a recipe, checked against its nodes, and print what it will run.

    Whatever else is on the command line changes the recipe, as for `gspo-megatron train`."""

    recipe: tyro.conf.Positional[Path]
    """The recipe, by a path that is valid where the job is submitted."""

    nodes: int
    """Nodes of the job."""

    ranks_per_node: int = 8
    """Ranks on each node; one GPU each, unless the recipe has device: cpu."""

    partition: str | None = None
    """None: the cluster's default."""

    time: str = "24:00:00"
    """Limit of one start, [days-][hours:]minutes:seconds; the job goes on in the next one."""

    grace: int = 300
    """Seconds before the limit at which the run is told to write a checkpoint; more than its longest step takes."""

    max_restarts: int = 3
    """How often torchrun starts the ranks anew after one failed, before the job fails."""

    cpus_per_rank: int = 0
    """CPU cores a rank; 0: the cluster's default."""

    array: str | None = None
    """One job a seed, as sbatch takes it: 1-5 or 1,3,7. The seed is added to the run's name."""

    sbatch: tuple[str, ...] = field(default=())
    """Further options for sbatch, such as account=mine exclusive."""

    logs: Path = Path("logs")
    """Folder for the job's log and one log a node, in the folder where the job is submitted."""

    output: Path | None = None
    """The script; None: NAME.sbatch here."""

    python: str = sys.executable
    """The interpreter on the nodes."""

    overwrite: bool = False
    """Replace a script that exists."""

    submit: bool = False
    """Call sbatch too."""

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node


def check(job: Job, config: TrainConfig) -> None:
    """Raise ConfigError for options that cannot work."""
    check_options(job, recipe="RECIPE")
    for name in ("nodes", "ranks_per_node", "grace"):
        flag = "--" + name.replace("_", "-")
        require(getattr(job, name) > 0, flag, getattr(job, name), "must be above 0", "Give 1 or more.")
    for name in ("max_restarts", "cpus_per_rank"):
        flag = "--" + name.replace("_", "-")
        require(getattr(job, name) >= 0, flag, getattr(job, name), "must be 0 or more", "Give 0 for none.")
    require(
        TIME.fullmatch(job.time) is not None,
        "--time",
        job.time,
        "is no time limit",
        "Write [days-][hours:]minutes:seconds, such as 24:00:00.",
    )
    require(
        seconds(job.time) > job.grace + 60,
        "--time",
        job.time,
        f"leaves no time to train before the run is told to stop, --grace {job.grace} s before (Slurm does so "
        "up to 60 s early)",
        "Give a longer limit, or a shorter grace.",
    )
    require(config.resume != "never", "resume", "never", "the job could not go on after a requeue", "Give auto.")
    _check_words(job, config)


def _check_words(job: Job, config: TrainConfig) -> None:
    """Each value that is written into the script has a rule; what the shell reads is quoted besides (script.py)."""
    require(
        re.fullmatch(r"(?!.*\.\.)[A-Za-z0-9_][\w.+-]*(/[\w.+-]+)*", str(job.logs), re.ASCII) is not None,
        "--logs",
        str(job.logs),
        "must be a folder below the current one, of plain characters",
        "Give logs.",
    )
    require(
        job.array is None or re.fullmatch(SEEDS, job.array) is not None,
        "--array",
        job.array,
        "is no list of seeds",
        "Write 1-5, or 1,3,7.",
    )
    if job.array:
        check_run_name(
            "name", config.name, LONGEST_NAME - len("-seed") - max(map(len, re.findall("[0-9]+", job.array)))
        )
    if job.partition is not None:
        check_word(
            "--partition", job.partition, r"[\w.-]+(,[\w.-]+)*", "Give a partition's name, or several with commas."
        )
    for option in job.sbatch:
        check_word("--sbatch", option, OPTION, "Write name or name=value, without spaces, such as account=mine.")
    check_path("the recipe's path", job.recipe)
    check_path("--python", Path(job.python))
    check_path("--output", job.output)


def check_overrides(words: list[str]) -> None:
    """Raise ConfigError for a word of the command line that would not stay on its line of the script."""
    for word in words:
        require(word.isprintable(), "the command line", word, "has a character that cannot be printed", "Take it out.")


def seconds(limit: str) -> int:
    """Return those of Slurm's [days-][hours:]minutes:seconds."""
    found = TIME.fullmatch(limit)
    if found is None:
        raise ValueError(f"{limit!r} is not [days-][hours:]minutes:seconds; check() refuses it")
    days, hours, minutes, rest = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def warnings(job: Job, layout: Layout) -> list[str]:
    """Return what works, but slowly."""
    tensor = layout.tensor_model_parallel_size * layout.context_parallel_size
    if tensor <= job.ranks_per_node and job.ranks_per_node % tensor == 0:
        return []
    return [
        f"tensor and context parallelism over {tensor} ranks cross nodes of {job.ranks_per_node}: their "
        "collectives run in every layer. Give sizes whose product divides --ranks-per-node."
    ]


def summary(job: Job, config: TrainConfig, layout: Layout, target: Path) -> str:
    """Say what the job will be, for people."""
    stages = layout.tensor_model_parallel_size * layout.context_parallel_size * layout.pipeline_model_parallel_size
    kind = "CPU, Gloo" if config.device == "cpu" else "GPU, NCCL"
    jobs = f", one job for each seed of {job.array}" if job.array else ""
    return (
        f"{target}: {config.name}, {job.nodes} nodes x {job.ranks_per_node} ranks ({kind}){jobs}\n"
        f"  layout   TP{layout.tensor_model_parallel_size} PP{layout.pipeline_model_parallel_size} "
        f"EP{layout.expert_model_parallel_size} CP{layout.context_parallel_size} DP{job.world_size // stages}\n"
        f"  limit    {job.time} a start; a checkpoint {job.grace} s before it, then back into the queue\n"
        f"  run      {config.output_dir / config.name}\n"
        f"  logs     {job.logs}/{config.name}-JOB.log, and one for each node"
    )
