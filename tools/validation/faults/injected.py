"""The trainer's own command line, with one thing broken at a moment of choice. Started by torchrun as the ranks.

FAULTS in the environment is a JSON list of [fault, rank, phase, step, start]: which rank is hit, in which step, at
which start of torchrun (its restart count). Everything up to that moment, and all other ranks, are untouched.
"""

import contextlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import torch

from gspo_megatron.backend.checkpoint import saver
from gspo_megatron.backend.engine import network, policy
from gspo_megatron.cli import main
from gspo_megatron.process import progress
from gspo_megatron.tasks import isolation
from gspo_megatron.trainer import finish, resume


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


class At:
    """Does something once, when the main thread comes to a place."""

    def __init__(self, phase: str, step: int, part: str, detail: str, act):
        self.wanted, self.act = (phase, step, part), act
        go = progress._go

        def watched(place: progress.Place) -> None:
            go(place)
            if self.act and (place.phase, place.step, place.part) == self.wanted and place.detail.startswith(detail):
                act, self.act = self.act, None
                act()

        progress._go = watched


def in_rollout(phase: str, step: int) -> None:
    At(phase, step, "rollout", "token 2", kill)


def in_forward(phase: str, step: int) -> None:
    At(phase, step, "update", "microbatch 1", kill)


def in_backward(phase: str, step: int) -> None:
    """In the middle of autograd: a hook on the first gradient that is ready after the forward."""
    from megatron.core.pipeline_parallel import schedules

    backward = schedules.backward_step

    def hooked(*args, **kwargs):
        here = progress.here()
        if (here.phase, here.step, here.part) == (phase, step, "update"):
            torch.autograd.graph.register_multi_grad_hook(_parameters(), lambda _: kill(), mode="any")
        return backward(*args, **kwargs)

    schedules.backward_step = hooked


def in_optimizer(phase: str, step: int) -> None:
    """This rank's weights have moved, its schedule has not, and others may be anywhere in between."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    on = OptimizerParamScheduler.step

    def hooked(self, increment):
        here = progress.here()
        if (here.phase, here.step) == (phase, step) and increment == 1:
            kill()
        on(self, increment)

    OptimizerParamScheduler.step = hooked


def in_checkpoint(phase: str, step: int) -> None:
    """Some of the files are there, with something in them."""

    def watch() -> None:
        folder = f"*/checkpoints/step_{step:06d}.unfinished"
        while not any(path.stat().st_size for path in Path("runs").glob(f"{folder}/*.distcp")):
            time.sleep(0.001)
        kill()

    threading.Thread(target=watch, daemon=True).start()


def hang(phase: str, step: int) -> None:
    At(phase, step, "update", "microbatch 1", stop)


def absent(phase: str, step: int) -> None:
    """The process lives, and its main thread does something else for ever."""
    At(phase, step, "update", "microbatch 1", lambda: time.sleep(10_000))


def nan_gradient(phase: str, step: int) -> None:
    _poison_gradients(phase, step, torch.nan)


def inf_gradient(phase: str, step: int) -> None:
    _poison_gradients(phase, step, torch.inf)


def _poison_gradients(phase: str, step: int, value: float) -> None:
    take = network.Network.step

    def poisoned(self, batches, loss_fn, after_backward=lambda: None, **rest):
        def spoil() -> None:
            after_backward()
            here = progress.here()
            if (here.phase, here.step) == (phase, step):
                next(iter(_parameters(self))).main_grad.view(-1)[0] = value

        return take(self, batches, loss_fn, spoil, **rest)

    network.Network.step = poisoned


def nan_loss(phase: str, step: int) -> None:
    _spoil_old_log_probs(phase, step, torch.nan)


def exploding_ratio(phase: str, step: int) -> None:
    """exp(20) for a whole response: finite, and absurd."""
    _spoil_old_log_probs(phase, step, -20.0)


def overflowing_ratio(phase: str, step: int) -> None:
    _spoil_old_log_probs(phase, step, -1000.0)


def _spoil_old_log_probs(phase: str, step: int, change: float) -> None:
    """Those of every trained token, once they are computed; only the last stage has them."""
    fill = policy.Policy.fill_old_log_probs

    def spoiled(self, batches):
        fill(self, batches)
        here = progress.here()
        for batch in batches if (here.phase, here.step) == (phase, step) else []:
            if batch.old_logprobs is not None:
                batch.old_logprobs = batch.old_logprobs + change * (batch.loss_mask > 0)

    policy.Policy.fill_old_log_probs = spoiled


def full_disk(phase: str, step: int) -> None:
    """Somebody else's file takes all but 1 MB of the disk, after the room for the checkpoint was found sufficient."""
    stage = saver._in_host_memory

    def filled(request):
        here = progress.here()
        if (here.phase, here.step) == (phase, step):
            with Path("runs/filler").open("wb") as filler, contextlib.suppress(OSError):
                filler.write(bytes(shutil.disk_usage("runs").free - (1 << 20)))
        return stage(request)

    saver._in_host_memory = filled


def full_disk_for_the_record(phase: str, step: int) -> None:
    """Somebody else's file takes all of the disk when a step begins; no checkpoint is written in that step."""

    def fill() -> None:
        with Path("runs/filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
            while filler.write(bytes(1 << 16)):
                pass

    At(phase, step, "rollout", "", fill)


def in_removal(phase: str, step: int) -> None:
    """An old checkpoint has lost its name and its first file."""
    clear = resume.clear

    def cut_off(path: Path) -> None:
        here = progress.here()
        if (here.phase, here.step) == (phase, step) and path.is_dir():
            next(path.glob("*.distcp")).unlink()
            kill()
        clear(path)

    resume.clear = cut_off


def in_charts(phase: str, step: int) -> None:
    """The last checkpoint and the Hugging Face folder are there, and nothing of what follows them."""
    finish.draw = lambda folder: kill()


def scorers(kind: str):
    def install(phase: str, step: int) -> None:
        isolation.PROGRAM = "tools.validation.faults.scorers"
        isolation.PASSED_ON = (*isolation.PASSED_ON, "SCORER")
        os.environ["SCORER"] = kind

    return install


_known: list = []


def _parameters(owner: network.Network | None = None) -> list:
    if owner is not None:
        return [p for model in owner.models for p in model.parameters()]
    return [p for one in _known for model in one.models for p in model.parameters()]


def _remember_networks() -> None:
    begin = network.Network.__init__

    def remembered(self, *args):
        begin(self, *args)
        _known.append(self)

    network.Network.__init__ = remembered


FAULTS = {
    "rollout": in_rollout, "forward": in_forward, "backward": in_backward, "optimizer": in_optimizer,
    "checkpoint": in_checkpoint, "hang": hang, "absent": absent, "nan gradient": nan_gradient,
    "inf gradient": inf_gradient, "nan loss": nan_loss, "exploding ratio": exploding_ratio,
    "overflowing ratio": overflowing_ratio, "full disk": full_disk,
    "full disk for the record": full_disk_for_the_record, "removal": in_removal, "charts": in_charts,
    "scorer raises": scorers("raises"), "scorer hangs": scorers("hangs"),
    "scorer gives nan": scorers("nan"), "scorer always raises": scorers("always raises"),
}  # fmt: skip


if __name__ == "__main__":
    _remember_networks()
    for name, rank, phase, step, start in json.loads(os.environ["FAULTS"]):
        if int(os.environ["RANK"]) == rank and int(os.environ["TORCHELASTIC_RESTART_COUNT"]) == start:
            FAULTS[name](phase, step)
    sys.exit(main.console(["train", *sys.argv[1:]]))
