"""The one reader of megatron.core.parallel_state: who am I in each parallel dimension, and which groups exist.

Everything else takes a `Topology`. Data-parallel sizes, ranks and groups are without context parallelism, as Megatron's
are by default: the context-parallel ranks of a data-parallel replica train on the same sequences. In generation each of
them is a replica of its own; those are numbered by `dp_cp_rank`.
"""

import gc
import math
from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from gspo_megatron.backend.parallel.objects import gather_objects
from gspo_megatron.backend.parallel.runtime import TIMEOUT
from gspo_megatron.config import Layout


@dataclass(frozen=True)
class Topology:
    """Sizes, ranks and groups of this process. Names are Megatron's."""

    tp_size: int
    tp_rank: int
    pp_size: int
    pp_rank: int
    vp_size: int  # virtual stages a rank, 1 when off
    first_stage_layers: int | None  # None: as many as the other stages
    last_stage_layers: int | None
    ep_size: int
    ep_rank: int
    etp_size: int
    etp_rank: int
    dp_size: int
    dp_rank: int
    cp_size: int
    cp_rank: int
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    dp_cp_group: dist.ProcessGroup  # data x context; its rank is dp_rank * cp_size + cp_rank
    model_parallel_group: dist.ProcessGroup  # the ranks that hold one copy of the model (TP x PP)
    feedback_group: dist.ProcessGroup  # same ranks as pp_group; for all that goes from the last stage to earlier ones
    publish_group: dist.ProcessGroup  # same ranks again; for what the last stage publishes while others still work
    groups: ProcessGroupCollection

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def is_first_of_replica(self) -> bool:
        """This rank is the first of those that hold one copy of the model; it scores."""
        return dist.get_rank(self.model_parallel_group) == 0

    @property
    def stage_ranks(self) -> list[int]:
        """Global ranks of the pipeline stages, first to last."""
        return dist.get_process_group_ranks(self.pp_group)

    @property
    def replicas(self) -> int:
        """Copies of the model that generate each on their own prompts: data x context parallel ranks."""
        return self.dp_size * self.cp_size

    @property
    def dp_cp_rank(self) -> int:
        """Number of this replica in generation; those of one data-parallel rank are neighbours."""
        return self.dp_rank * self.cp_size + self.cp_rank

    @property
    def sequence_multiple(self) -> int:
        """Sequences are padded to a multiple of this, so that they can be cut into 2 CP equal chunks."""
        return 2 * self.cp_size if self.cp_size > 1 else 1

    @property
    def microbatch_multiple(self) -> int:
        """Microbatches are padded to a multiple of this: a context-parallel rank's tokens are cut over tensor ranks,
        and the padding is a multiple of sequence_multiple itself."""
        return self.cp_size * math.lcm(self.tp_size, 2) if self.cp_size > 1 else self.tp_size

    @property
    def experts_span_replicas(self) -> bool:
        """In generation, experts are dispatched to ranks that hold other sequences, so those must step together.

        An expert group is ep * etp neighbours among the tensor, context and data ranks of a stage, in that order, and a
        replica in generation is tp neighbours.
        """
        return self.tp_size % (self.ep_size * self.etp_size) != 0

    @property
    def coordinates(self) -> str:
        """This rank's place in the layout, for people: `TP0 PP1 DP0 EP1`."""
        places = {
            "TP": (self.tp_rank, self.tp_size),
            "CP": (self.cp_rank, self.cp_size),
            "PP": (self.pp_rank, self.pp_size),
            "DP": (self.dp_rank, self.dp_size),
            "EP": (self.ep_rank, self.ep_size),
        }
        return " ".join(f"{name}{rank}" for name, (rank, size) in places.items() if size > 1 or name == "PP")

    def describe(self) -> str:
        """Describe the layout for people: `tensor 2 (sequence parallel) x pipeline 2 x data 1, experts over 2`."""
        tensor = f"tensor {self.tp_size}" + (" (sequence parallel)" if self.tp_size > 1 else "")
        pipeline = f"pipeline {self.pp_size}" + (f" x {self.vp_size} virtual" if self.vp_size > 1 else "")
        experts = f"experts over {self.ep_size}" + (f" x tensor {self.etp_size}" if self.etp_size > 1 else "")
        context = f" x context {self.cp_size}" if self.cp_size > 1 else ""
        return f"{tensor}{context} x {pipeline} x data {self.dp_size}, {experts}"


def initialize_model_parallel(layout: Layout, seed: int) -> Topology:
    """Build Megatron's process groups for a resolved layout and seed its RNG trackers.

    Args:
        layout: every size filled in (resolve_layout).
        seed: of Megatron's trackers; our own initial weights do not use them (parameters.py).
    """
    gc.collect()  # models of an earlier layout hang in reference cycles and hold their groups, with all their threads
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline_model_parallel_size,
        context_parallel_size=layout.context_parallel_size or 1,
        expert_model_parallel_size=layout.expert_model_parallel_size,
        expert_tensor_parallel_size=layout.expert_tensor_parallel_size,
        distributed_timeout_minutes=int(TIMEOUT.total_seconds() // 60),
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(seed)
    pp_group = parallel_state.get_pipeline_model_parallel_group()
    return Topology(
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        vp_size=layout.virtual_pipeline_model_parallel_size or 1,
        first_stage_layers=layout.num_layers_in_first_pipeline_stage,
        last_stage_layers=layout.num_layers_in_last_pipeline_stage,
        ep_size=parallel_state.get_expert_model_parallel_world_size(),
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        etp_size=parallel_state.get_expert_tensor_parallel_world_size(),
        etp_rank=parallel_state.get_expert_tensor_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        cp_size=parallel_state.get_context_parallel_world_size(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=pp_group,
        dp_group=parallel_state.get_data_parallel_group(),
        cp_group=parallel_state.get_context_parallel_group(),
        dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        model_parallel_group=parallel_state.get_model_parallel_group(),
        feedback_group=_group_like(pp_group),
        publish_group=_group_like(pp_group),
        groups=ProcessGroupCollection.use_mpu_process_groups(),
    )


def destroy_model_parallel() -> None:
    """Leave all process groups but the default one. Megatron only forgets its own, and Gloo keeps threads for each
    until it is destroyed: a process that goes through many layouts would drown in them."""
    parallel_state.destroy_model_parallel()
    for group in list(dist.distributed_c10d._world.pg_map):  # in the order of creation, the same on every rank
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def _group_like(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """Another communicator over the same ranks: on NCCL, traffic against the pipeline's direction must not queue
    behind it. Every rank must call new_group for every group, in one order."""
    mine = dist.get_process_group_ranks(group)
    order = sorted({tuple(ranks) for ranks in gather_objects(mine)})
    created = {ranks: dist.new_group(list(ranks), timeout=TIMEOUT) for ranks in order}
    return created[tuple(mine)]
