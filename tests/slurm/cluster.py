"""A real Slurm of two virtual nodes on the loopback interface: munged, slurmctld, and one slurmd a node.

It uses its own keys, sockets, ports and folders, so it can run beside a Slurm of the machine. What is unusual for a
cluster is said in CONF: all of it makes failures show within seconds, or replaces what a container does not have
(cgroups, an accounting database).
"""

import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from tools.validation.launching import wait_until

DAEMONS = ("munged", "slurmctld", "slurmd")
NODES = ("node1", "node2")
STOPPED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY")
CONF = """\
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
AuthType=auth/munge
CredType=cred/munge
# A credential's life is how long a requeued job waits (120 s if not said).
AuthInfo=socket={folder}/munge.sock,cred_expire=5
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
# No cgroups and no database.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
SelectType=select/linear
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# So that a job that is preempted gets its --signal.
SlurmctldParameters=preempt_send_user_signal
SlurmdTimeout=10
ReturnToService=2
KillWait=20
MpiDefault=none
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port1} CPUs=2 State=UNKNOWN
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port2} CPUs=2 State=UNKNOWN
PartitionName=low Nodes=node1,node2 Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 MaxTime=INFINITE State=UP
PartitionName=high Nodes=node1,node2 PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
"""  # noqa: E501  (a line of slurm.conf cannot be broken)


def missing() -> list[str]:
    """The daemons that are not installed here."""
    return [name for name in DAEMONS if shutil.which(name, path=_path()) is None]


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


class Cluster:
    """Its daemons are children of this process. Use `cluster()`, which ends them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "RANK", "WORLD_SIZE"))}
        # Both nodes are this machine, whose own name does not lead to the loopback interface.
        self.env |= {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": _path(),
            "MASTER_ADDR": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        self.daemons: dict[str, subprocess.Popen] = {}

    def start(self) -> None:
        controller, port1, port2 = _free_ports(3)
        host = socket.gethostname().split(".")[0]
        text = CONF.format(
            folder=self.folder, host=host, user=getpass.getuser(), controller=controller, port1=port1, port2=port2
        )
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "state").mkdir()
        for node in NODES:
            (self.folder / f"spool-{node}").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        files = [
            f"--{name.replace('.', '-')}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")
        ]
        self._start("munged", "munged", "--foreground", "--force", *files, f"--socket={self.folder}/munge.sock")
        wait_until((self.folder / "munge.sock").exists, 10)
        self._start("slurmctld", "slurmctld", "-D")
        for node in NODES:
            self.start_node(node)
        wait_until(lambda: self.states() == ["idle", "idle"], 120)
        assert self.states() == ["idle", "idle"], self.log()

    def start_node(self, node: str) -> None:
        self._start(node, "slurmd", "-D", "-N", node)

    def _start(self, label: str, *command: str) -> None:
        with (self.folder / f"{label}.out").open("ab") as out:
            # However these tests end, their daemons end too.
            command = ("setpriv", "--pdeathsig", "TERM", *command)
            self.daemons[label] = subprocess.Popen(command, env=self.env, stdout=out, stderr=out, cwd=self.folder)

    def call(self, *command: str, cwd: Path | None = None) -> str:
        done = subprocess.run(command, env=self.env, cwd=cwd, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}\n{self.log()}"
        return done.stdout.strip()

    def submit(self, script: Path, *options: str, cwd: Path) -> str:
        """Returns the job's number."""
        return self.call("sbatch", "--parsable", *options, str(script), cwd=cwd)

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says of it."""
        words = self.call("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, number: str) -> str:
        return self.job(number)["JobState"]

    def states(self) -> list[str]:
        """Of the nodes, as sinfo writes them: idle, alloc, down, down*."""
        done = subprocess.run(
            ["sinfo", "-h", "-N", "-p", "low", "-o", "%t"], env=self.env, capture_output=True, text=True
        )
        return done.stdout.split()

    def lose_node(self, node: str) -> None:
        """kill -9 of all that runs on it at once, as if its power was cut."""
        lost = [self.daemons.pop(node).pid]
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                env = process.environ()
                if env.get("SLURMD_NODENAME") == node and env.get("SLURM_CONF") == self.env["SLURM_CONF"]:
                    lost.append(process.pid)
                    if process.parent().name().startswith("slurmstepd"):
                        lost.append(process.ppid())
        for pid in dict.fromkeys(lost):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def end_lost_sruns(self) -> None:
        """A script's srun whose script was ended before it: cgroups would find it, linuxproc follows parents. It would
        wait for its step, lose patience, and end the job's next step, which has the same number."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                is_ours = process.environ().get("SLURM_CONF") == self.env["SLURM_CONF"]
                if is_ours and process.name() == "srun" and process.ppid() == 1:
                    process.kill()

    def log(self) -> str:
        """The ends of what all daemons wrote."""
        paths = sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")])
        texts = ((path.name, path.read_text(errors="replace").strip()) for path in paths)
        return "\n".join(f"---- {name}\n{text[-4000:]}" for name, text in texts if text)

    def stop(self) -> None:
        if {"slurmctld", "munged"} <= self.daemons.keys():
            subprocess.run(["scancel", "--user", getpass.getuser()], env=self.env, timeout=30)
            wait_until(lambda: not subprocess.run(["squeue", "-h"], env=self.env, capture_output=True).stdout, 30)
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """A running cluster, which leaves nothing behind. Its folder has a short name: that of a socket may have 107."""
    with tempfile.TemporaryDirectory(prefix="slurm_") as name:
        made = Cluster(Path(name))
        try:
            made.start()
            yield made
        finally:
            made.stop()


def _free_ports(count: int) -> list[int]:
    """Below those that the kernel gives to whoever asks for any: a test beside this one may ask before Slurm binds."""
    first_given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    free: list[int] = []
    while len(free) < count:
        port = first_given - 1 - secrets.randbelow(10_000)
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            free += [port] if port not in free else []
    return free
