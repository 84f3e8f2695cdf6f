"""gspo-megatron slurm: a batch script for a recipe, checked against the nodes before it waits in a queue.

The script starts one torchrun a node through srun. What it relies on is in docs/slurm.md; examples/slurm/train.sbatch
is what this module writes for the example recipe, so the two cannot differ.

Left out: containers (wrap the python line), several recipes in one job, and following the job: squeue and the logs do.
"""

import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from gspo_megatron.config import ParallelConfig, TrainConfig, require
from gspo_megatron.process import REQUEUE, STATUS_FILE

PROGRAM = "gspo-megatron slurm"
NODE_LOST = 900  # seconds; Slurm calls a node down after SlurmdTimeout, 300 unless the cluster changed it
TIME = re.compile(r"(?:(?:(\d+)-)?(\d+):)?(\d+):(\d\d)$")  # [days-][hours:]minutes:seconds
TEMPLATE = """\
#!/bin/bash
# @COMMENT@
#SBATCH --job-name=@NAME@
# The partition, if not the cluster's default:
@PARTITION@
#SBATCH --nodes=@NODES@
#SBATCH --ntasks-per-node=1
@RESOURCES@
#SBATCH --time=@TIME@
# Preempted, lost a node or out of time: back into the queue, and on from the newest checkpoint.
#SBATCH --requeue
# So many seconds before the end every rank gets SIGUSR1: the step is finished and a checkpoint written.
#SBATCH --signal=USR1@@GRACE@
#SBATCH --open-mode=append
# Slurm makes no folders, and without this one the job fails without a word: mkdir -p @LOGS@
#SBATCH --output=@LOGS@/%x-%j.log
set -uo pipefail
cd "$SLURM_SUBMIT_DIR"

python=@PYTHON@
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Since 22.05 srun does not take this over from sbatch by itself.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
# The network interface, where the default one is not what joins the nodes:
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# A run that stops with a checkpoint to go on from says so here; torchrun's own status cannot.
export @STATUS_FILE@=$PWD/@LOGS@/.status-$SLURM_JOB_ID
rm -f "$@STATUS_FILE@"

head=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
rendezvous=$head:$((20000 + SLURM_JOB_ID % 20000))
echo "$(date -Is) start ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST, rendezvous at $rendezvous"

# SIGUSR1 reaches every process of the step: torchrun must ignore it, the ranks answer it.
srun --kill-on-bad-exit=1 --open-mode=append --output="@LOGS@/%x-%j-%n-%N.log" \\
    bash -c 'trap "" USR1; exec "$@"' torchrun \\
    "$python" -m torch.distributed.run --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node @RANKS@ \\
    --max-restarts @RESTARTS@ --rdzv-backend c10d --rdzv-endpoint "$rendezvous" \\
    --rdzv-id "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" -m gspo_megatron.cli \\
    train @TRAIN@
status=$?

if [ "$(cat "$@STATUS_FILE@" 2>/dev/null)" = @REQUEUE@ ]; then
    rm -f "$@STATUS_FILE@"
    echo "$(date -Is) stopped with a checkpoint: back into the queue"
    # Slurm ends this script while it sleeps. Where users may not requeue, RequeueExit=@REQUEUE@ in slurm.conf does it.
    scontrol requeue "$SLURM_JOB_ID" && sleep 60
    exit @REQUEUE@
fi
# A node that is lost fails the step before Slurm has noticed its silence, and a job that ends now would not go on.
if [ $status -ne 0 ] && ! timeout 90 srun --overlap --quiet true; then
    echo "$(date -Is) a node does not answer: Slurm takes the job back into the queue when it has noticed that"
    sleep @NODE_LOST@
fi
echo "$(date -Is) ended with status $status"
exit $status
"""


@dataclass(frozen=True)
class Options:
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


def main(argv: list[str]) -> int:
    """Run the command. Returns the exit status: 0, or sbatch's.

    Raises:
        ConfigError: the recipe does not fit the nodes, or an option cannot work.
        SystemExit: 0 for --help, 2 for a value of the wrong type.
    """
    from gspo_megatron import advice, recipe
    from gspo_megatron import check as checks

    options, rest = tyro.cli(Options, prog=PROGRAM, args=argv, return_unknown_args=True)
    config = recipe.load([str(options.recipe), *rest], program=PROGRAM)
    check(options, config)
    layout = checks.resolve_layout(config, options.world_size, has_cuda=config.device != "cpu")
    checks.check(config, layout, options.world_size)
    target = options.output or Path(f"{config.name}.sbatch")
    require(options.overwrite or not target.exists(), "--output", str(target), "exists already",
            "Give --overwrite to replace it, or another name.")  # fmt: skip
    require(target.absolute().parent.is_dir(), "--output", str(target), "its folder does not exist",
            "Make the folder first.")  # fmt: skip
    options.logs.mkdir(parents=True, exist_ok=True)
    target.write_text(render(options, config, rest))
    for sentence in [*warnings(options, layout), *advice.warnings(config)]:
        print(f"warning: {sentence}", file=sys.stderr)
    print(summary(options, config, layout, target))
    if options.submit:
        return subprocess.run(["sbatch", str(target)]).returncode
    print(f"submit it with: sbatch {target}")
    return 0


def check(options: Options, config: TrainConfig) -> None:
    """Raise ConfigError for options that cannot work."""
    for name in ("nodes", "ranks_per_node", "grace"):
        flag = "--" + name.replace("_", "-")
        require(getattr(options, name) > 0, flag, getattr(options, name), "must be above 0", "Give 1 or more.")
    for name in ("max_restarts", "cpus_per_rank"):
        flag = "--" + name.replace("_", "-")
        require(getattr(options, name) >= 0, flag, getattr(options, name), "must be 0 or more", "Give 0 for none.")
    require(TIME.match(options.time) is not None, "--time", options.time, "is no time limit",
            "Write [days-][hours:]minutes:seconds, such as 24:00:00.")  # fmt: skip
    require(seconds(options.time) > options.grace + 60, "--time", options.time,
            f"leaves no time to train before the run is told to stop, --grace {options.grace} s before (Slurm does so "
            "up to 60 s early)", "Give a longer limit, or a shorter grace.")  # fmt: skip
    require(config.resume == "auto", "resume", config.resume, "the job could not go on after a requeue", "Give auto.")
    require(re.fullmatch(r"(?!.*\.\.)[\w.+-]+(/[\w.+-]+)*", str(options.logs)) is not None, "--logs", str(options.logs),
            "must be a folder below the current one, of plain characters", "Give logs.")  # fmt: skip
    require(options.array is None or re.fullmatch(r"[\d,\-:]+(%\d+)?", options.array) is not None, "--array",
            options.array, "is no list of seeds", "Write 1-5, or 1,3,7.")  # fmt: skip


def seconds(limit: str) -> int:
    """Of Slurm's [days-][hours:]minutes:seconds."""
    days, hours, minutes, rest = (int(part or 0) for part in TIME.match(limit).groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def warnings(options: Options, layout: ParallelConfig) -> list[str]:
    """What works, but slowly."""
    tensor = layout.tensor_model_parallel_size * layout.context_parallel_size
    if tensor <= options.ranks_per_node and options.ranks_per_node % tensor == 0:
        return []
    return [
        f"tensor and context parallelism over {tensor} ranks cross nodes of {options.ranks_per_node}: their "
        "collectives run in every layer. Give sizes whose product divides --ranks-per-node."
    ]


def render(options: Options, config: TrainConfig, overrides: list[str]) -> str:
    """The batch script."""
    train = [shlex.quote(word) for word in (str(options.recipe), *overrides)]
    resources = []
    if config.device != "cpu":
        resources.append(f"#SBATCH --gpus-per-node={options.ranks_per_node}")
    if options.cpus_per_rank:
        resources.append(f"#SBATCH --cpus-per-task={options.cpus_per_rank * options.ranks_per_node}")
    if options.array:
        resources.append(f"#SBATCH --array={options.array}")
        train += [f'--name "{config.name}-seed$SLURM_ARRAY_TASK_ID"', '--seed "$SLURM_ARRAY_TASK_ID"']
    resources += [f"#SBATCH --{option}" for option in options.sbatch]
    values = {
        "COMMENT": f"Written by `{PROGRAM}`: {options.recipe} on {options.nodes} nodes.",
        "NAME": config.name, "NODES": options.nodes, "RANKS": options.ranks_per_node, "TIME": options.time,
        "PARTITION": f"#SBATCH --partition={options.partition}" if options.partition else "##SBATCH --partition=gpu",
        "RESOURCES": "\n".join(resources) or "# No resources beyond the nodes.", "GRACE": options.grace,
        "LOGS": options.logs, "PYTHON": shlex.quote(options.python),
        "RESTARTS": options.max_restarts, "TRAIN": " ".join(train), "STATUS_FILE": STATUS_FILE, "REQUEUE": REQUEUE,
        "NODE_LOST": NODE_LOST,
    }  # fmt: skip
    return re.sub(r"@([A-Z_]+)@", lambda found: str(values[found[1]]), TEMPLATE)


def summary(options: Options, config: TrainConfig, layout: ParallelConfig, target: Path) -> str:
    """What the job will be, for people."""
    stages = layout.tensor_model_parallel_size * layout.context_parallel_size * layout.pipeline_model_parallel_size
    kind = "CPU, Gloo" if config.device == "cpu" else "GPU, NCCL"
    jobs = f", one job for each seed of {options.array}" if options.array else ""
    return (
        f"{target}: {config.name}, {options.nodes} nodes x {options.ranks_per_node} ranks ({kind}){jobs}\n"
        f"  layout   TP{layout.tensor_model_parallel_size} PP{layout.pipeline_model_parallel_size} "
        f"EP{layout.expert_model_parallel_size} CP{layout.context_parallel_size} DP{options.world_size // stages}\n"
        f"  limit    {options.time} a start; a checkpoint {options.grace} s before it, then back into the queue\n"
        f"  run      {config.output_dir / config.name}\n"
        f"  logs     {options.logs}/{config.name}-JOB.log, and one for each node"
    )
