"""A job's batch script starts one torchrun a node through srun.

What it relies on is in docs/slurm.md; examples/slurm/train.sbatch is what this module writes for the example recipe, so
the two cannot differ. Left out: containers (wrap the python line), several recipes in one job, and following the job:
squeue and the logs do.
"""

import re
import shlex

from gspo_megatron.config import TrainConfig
from gspo_megatron.process.lifecycle import REQUEUE, STATUS_FILE
from gspo_megatron.slurm.job import Job

PROGRAM = "gspo-megatron slurm"
NODE_LOST = 900  # seconds; Slurm calls a node down after SlurmdTimeout, 300 unless the cluster changed it
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


def render(job: Job, config: TrainConfig, overrides: list[str]) -> str:
    """Return the batch script.

    Args:
        overrides: words of the command line that change the recipe.
    """
    train = [shlex.quote(word) for word in (str(job.recipe), *overrides)]
    resources = []
    if config.device != "cpu":
        resources.append(f"#SBATCH --gpus-per-node={job.ranks_per_node}")
    if job.cpus_per_rank:
        resources.append(f"#SBATCH --cpus-per-task={job.cpus_per_rank * job.ranks_per_node}")
    if job.array:
        resources.append(f"#SBATCH --array={job.array}")
        train += [f'--name "{config.name}-seed$SLURM_ARRAY_TASK_ID"', '--seed "$SLURM_ARRAY_TASK_ID"']
    resources += [f"#SBATCH --{option}" for option in job.sbatch]
    values = {
        "COMMENT": f"Written by `{PROGRAM}`: {job.recipe} on {job.nodes} nodes.",
        "NAME": config.name,
        "NODES": job.nodes,
        "RANKS": job.ranks_per_node,
        "TIME": job.time,
        "PARTITION": f"#SBATCH --partition={job.partition}" if job.partition else "##SBATCH --partition=gpu",
        "RESOURCES": "\n".join(resources) or "# No resources beyond the nodes.",
        "GRACE": job.grace,
        "LOGS": job.logs,
        "PYTHON": shlex.quote(job.python),
        "RESTARTS": job.max_restarts,
        "TRAIN": " ".join(train),
        "STATUS_FILE": STATUS_FILE,
        "REQUEUE": REQUEUE,
        "NODE_LOST": NODE_LOST,
    }
    return re.sub(r"@([A-Z_]+)@", lambda found: str(values[found[1]]), TEMPLATE)
