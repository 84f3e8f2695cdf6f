"""Megatron's Adam and learning-rate schedules."""

from typing import Any, Literal

from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from gspo_megatron.backend.parallel.topology import Topology
from gspo_megatron.config import Layout, OptimizerConfig, WarmStartConfig


def build(config: OptimizerConfig, chunks: list, topology: Topology, layout: Layout) -> MegatronOptimizer:
    """Make Adam with fp32 master weights over the DDP-wrapped chunks, sharded over data parallelism when asked for."""
    model_config = chunks[0].config
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=0.0,
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_eps=config.adam_eps,
            clip_grad=config.clip_grad,
            bf16=model_config.bf16,
            params_dtype=model_config.params_dtype,
            use_distributed_optimizer=layout.use_distributed_optimizer,
        ),
        chunks,
        pg_collection=topology.groups,
        use_gloo_process_groups=False,
    )
    for part in parts(optimizer):
        for group in part.optimizer.param_groups:
            if "fused" in group:  # torch's Adam, where neither Transformer Engine nor apex is there
                group["fused"] = True  # one kernel a parameter in place of eleven
    return optimizer


def rl_schedule(optimizer: MegatronOptimizer, config: OptimizerConfig, steps: int) -> OptimizerParamScheduler:
    """Make a schedule that warms up linearly over warmup_steps and then follows lr_decay_style over `steps` in all."""
    style = config.lr_decay_style
    end = config.lr if style == "constant" else config.min_lr
    return _schedule(optimizer, config.lr, end, config.warmup_steps, steps, config.weight_decay, style)


def warm_start_schedule(optimizer: MegatronOptimizer, config: WarmStartConfig) -> OptimizerParamScheduler:
    """Make a schedule that warms up linearly and then follows a cosine down to min_lr."""
    return _schedule(optimizer, config.lr, config.min_lr, config.warmup_steps, config.steps, 0.0, "cosine")


def _schedule(
    optimizer: MegatronOptimizer,
    lr: float,
    min_lr: float,
    warmup_steps: int,
    steps: int,
    weight_decay: float,
    style: Literal["constant", "linear", "cosine"],
) -> OptimizerParamScheduler:
    steps = max(steps, warmup_steps + 1)
    for group in optimizer.param_groups:
        # Megatron lets a group's own limits win over the schedule's.
        group["max_lr"], group["min_lr"] = lr, min_lr
    schedule = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=lr,
        min_lr=min_lr,
        lr_warmup_steps=warmup_steps,
        lr_decay_steps=steps,
        lr_decay_style=style,
        start_wd=weight_decay,
        end_wd=weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    # The first step would otherwise run with learning rate 0.
    schedule.step(increment=1 if warmup_steps else 0)
    return schedule


def step(optimizer: MegatronOptimizer, grad_norm: float) -> None:
    """Clip gradients that are prepared, by their norm, and change the weights: Megatron's step(), which would compute
    the norm once more.

    Source: ChainedOptimizer.step of megatron.core.optimizer.optimizer.
    """
    for part in parts(optimizer):
        if (parameters := part.get_parameters()) and part.config.clip_grad > 0.0:
            clip_grad_by_total_norm_fp32(parameters, max_norm=part.config.clip_grad, total_norm=grad_norm)
    optimizer.step_with_ready_grads()


def parts(optimizer: MegatronOptimizer) -> list[Any]:
    """Return Megatron's optimizers: one for experts and one for the rest, or fewer; those without parameters on this
    rank have nothing to say."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in chained if not part.is_stub_optimizer]


def learning_rate(optimizer: MegatronOptimizer) -> float:
    """Return the rate that the optimizer is set to: of the step just made, until the schedule moves on."""
    return float(next(group["lr"] for group in optimizer.param_groups))
