"""Adam's state by parameter, in the shapes of the model's own shards, whatever kind of Megatron optimizer holds it.

A checkpoint keeps it in one format: for each model shard `exp_avg` and `exp_avg_sq`, and `main` where the optimizer has
an fp32 copy of a bf16 weight. So a run can go on under any other layout, with or without the distributed optimizer and
with experts cut otherwise, which Megatron's own optimizer checkpoints cannot (their keys depend on how many optimizers
are chained).

The price: a distributed optimizer's pieces are put together over data parallelism while a checkpoint is written or read
(12 bytes a parameter of this rank's shard, for that moment). Left out: optimizers other than Adam, and loss scaling.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer

from gspo_megatron.backend.engine.optimizer import parts

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class ParameterState:
    """Where one model parameter's state lives on this rank."""

    model: torch.nn.Parameter
    main: torch.Tensor | None  # what Adam steps: the parameter itself, its fp32 copy, or this rank's flat piece of one
    adam: torch.optim.Optimizer
    piece: slice | None  # of the flattened parameter; None: all of it is here
    group: dist.ProcessGroup | None  # over which the pieces are spread

    @property
    def keeps_main(self) -> bool:
        """The fp32 copy says more than the weight does."""
        return self.model.dtype in (torch.bfloat16, torch.float16)

    def read(self) -> dict[str, torch.Tensor]:
        """Each of MOMENTS, and "main" where it is kept, in the parameter's shape. A collective if there are pieces."""
        found = {}
        for name in self._names:
            local = self._local(name)
            if self.piece is None:
                assert local is not None  # all of it is here
                found[name] = local
                continue
            whole = torch.zeros(self.model.numel(), dtype=torch.float32, device=self.model.device)
            if local is not None:
                whole[self.piece] = local
            dist.all_reduce(whole, group=self.group)  # each place has one rank's number; the others add 0
            found[name] = whole.view(self.model.shape)
        return found

    def room(self) -> dict[str, torch.Tensor]:
        """Return tensors as `read` gives them, with nothing in them yet."""
        if self.piece is not None:
            dtype = torch.float32
        else:
            assert self.main is not None  # all of it is here
            dtype = self.main.dtype
        return {name: torch.empty(self.model.shape, dtype=dtype, device=self.model.device) for name in self._names}

    def write(self, values: dict[str, torch.Tensor], steps: int) -> None:
        """Take what `read` gave; `steps` is how many Adam has made."""
        if self.main is None:
            return
        if self.keeps_main:
            self.main.data.copy_(self._cut(values["main"]))
        state = self.adam.state[self.main]
        for name in MOMENTS:
            state[name] = self._cut(values[name]).to(self.main.dtype, copy=True)
        if _counts_by_parameter(self.adam):
            # A fused Adam's kernel reads the count where the parameter is; others want it on the CPU.
            is_fused = any(group.get("fused") for group in self.adam.param_groups)
            state["step"] = torch.tensor(float(steps), device=self.main.device if is_fused else "cpu")

    @property
    def _names(self) -> tuple[str, ...]:
        return (*MOMENTS, "main") if self.keeps_main else MOMENTS

    def _cut(self, whole: torch.Tensor) -> torch.Tensor:
        return whole if self.piece is None else whole.reshape(-1)[self.piece]

    def _local(self, name: str) -> torch.Tensor | None:
        if self.main is None:
            return None
        if name == "main":
            return self.main.detach()
        state = self.adam.state.get(self.main, {})
        return state[name] if name in state else torch.zeros_like(self.main)  # before its first step


def _counts_by_parameter(adam: torch.optim.Optimizer) -> bool:
    """torch's Adam counts steps in each parameter's state; Apex's and Transformer Engine's in the group."""
    return type(adam).__module__.startswith("torch.optim")


def each(optimizer: MegatronOptimizer) -> Iterator[ParameterState]:
    """Every model parameter that this rank's optimizers train, in the same order on all ranks of a stage."""
    for part in parts(optimizer):
        yield from _distributed(part) if isinstance(part, DistributedOptimizer) else _whole(part)


def steps_made(optimizer: MegatronOptimizer) -> int:
    """Count Adam's steps so far: the same for every parameter, because none is ever stepped alone."""
    for part in parts(optimizer):
        counts = [state["step"] for state in part.optimizer.state.values() if "step" in state]
        counts += [group["step"] for group in part.optimizer.param_groups if "step" in group]
        if counts:
            return int(counts[0])
    return 0


def set_steps(optimizer: MegatronOptimizer, steps: int) -> None:
    """Tell the Adams that count in the group; the others are told by ParameterState.write."""
    for part in parts(optimizer):
        if not _counts_by_parameter(part.optimizer):
            for group in part.optimizer.param_groups:
                group["step"] = steps


def _whole(part: MegatronOptimizer) -> Iterator[ParameterState]:
    copies: dict[int, torch.nn.Parameter] = {}  # by the id of their fp32 copy
    for low, high in zip(
        getattr(part, "float16_groups", []), getattr(part, "fp32_from_float16_groups", []), strict=True
    ):
        copies |= {id(main): model for model, main in zip(low, high, strict=True)}
    for group in part.optimizer.param_groups:
        for main in group["params"]:
            yield ParameterState(copies.get(id(main), main), main, part.optimizer, None, None)


def _distributed(part: DistributedOptimizer) -> Iterator[ParameterState]:
    for buffer in part.buffers:
        for model in buffer.params:
            main, piece = None, slice(0, 0)
            if model in part.model_param_group_index_map:
                main = part._get_main_param_and_optimizer_states(model)["param"]
                place = part._get_model_param_range_map(model)["param"]
                piece = slice(place.start, place.end)
            yield ParameterState(model, main, part.optimizer, piece, part.data_parallel_group)
