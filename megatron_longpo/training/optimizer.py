"""Megatron's optimizer and learning-rate schedule for a run."""

from __future__ import annotations

import gc

import torch
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_longpo import platform
from megatron_longpo.config import RunConfig
from megatron_longpo.training.fused_adam import fuse_adam


def build_optimizer(config: RunConfig, chunks: list[torch.nn.Module]) -> MegatronOptimizer:
    """Megatron's (distributed) optimizer over all model chunks; fp32 master weights under bf16.

    Raises:
        ValueError: ``--optimizer-cpu-offload`` without a GPU.
    """
    settings = config.optimizer
    if settings.optimizer_cpu_offload:
        refuse_offload_without_gpu()
    with platform.construction():
        optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer=settings.optimizer,
                lr=settings.lr,
                min_lr=settings.min_lr,
                weight_decay=settings.weight_decay,
                adam_beta1=settings.adam_beta1,
                adam_beta2=settings.adam_beta2,
                adam_eps=settings.adam_eps,
                sgd_momentum=settings.sgd_momentum,
                clip_grad=settings.clip_grad,
                bf16=config.training.bf16,
                params_dtype=torch.bfloat16 if config.training.bf16 else torch.float32,
                use_distributed_optimizer=config.parallel.use_distributed_optimizer,
                overlap_param_gather=config.parallel.overlap_param_gather,
                optimizer_cpu_offload=settings.optimizer_cpu_offload,
                optimizer_offload_fraction=settings.optimizer_offload_fraction,
                overlap_cpu_optimizer_d2h_h2d=settings.overlap_cpu_optimizer_d2h_h2d,
                # The hybrid optimizer holds the master weights itself, which is what this means with it.
                use_precision_aware_optimizer=settings.optimizer_cpu_offload,
            ),
            chunks,
            use_gloo_process_groups=False,
        )
    if settings.optimizer == "sgd":
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            part.init_state_fn = _start_momentum
    if platform.has_cuda():
        fuse_adam(optimizer)
    if settings.optimizer_cpu_offload:
        # Megatron makes the hybrid optimizer of all weights, then that of the rank's shard. The first is a cycle of
        # references that holds all weights on the host in fp32.
        gc.collect()
    return optimizer


def _start_momentum(optimizer: torch.optim.Optimizer, config: OptimizerConfig | None = None) -> None:
    """The state that a checkpoint is loaded into; Megatron has a function for that for Adam only."""
    for group in optimizer.param_groups:
        if group["momentum"]:
            for param in group["params"]:
                optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param)


def awaits_first_step(optimizer: MegatronOptimizer) -> bool:
    """Whether an optimizer has no state yet, as every step so far was skipped, and needs some.

    torch's optimizers make it in their first step, so a checkpoint has none; Megatron's distributed one always has it.
    """
    parts = [part for part in getattr(optimizer, "chained_optimizers", [optimizer]) if part.optimizer is not None]
    if any(isinstance(part, DistributedOptimizer) for part in parts):
        return False
    groups = [group for part in parts for group in part.optimizer.param_groups]
    is_stateless = all(group.get("momentum") == 0 for group in groups)
    return not is_stateless and not any(part.optimizer.state for part in parts)


def refuse_offload_without_gpu() -> None:
    """Raise ValueError where Megatron's hybrid optimizer finds no second memory."""
    if not platform.has_cuda():
        raise ValueError("--optimizer-cpu-offload needs a GPU: on a CPU all state is in host memory; remove it")


def build_scheduler(config: RunConfig, optimizer: MegatronOptimizer, train_samples: int) -> OptimizerParamScheduler:
    """Megatron's schedule, counted in samples so that it does not depend on the batch size.

    Args:
        config: The run.
        optimizer: Whose parameter groups it writes to.
        train_samples: Length of the run in documents; the decay's length unless a flag says otherwise.
    """
    settings, batch = config.optimizer, config.training.global_batch_size

    def samples(iters: int | None, in_samples: int | None, otherwise: int) -> int:
        if iters is not None:
            return iters * batch
        return in_samples if in_samples is not None else otherwise

    decay = samples(settings.lr_decay_iters, settings.lr_decay_samples, train_samples)
    by_fraction = round(settings.lr_warmup_fraction * decay)
    warmup = samples(settings.lr_warmup_iters, settings.lr_warmup_samples, by_fraction)
    wsd = samples(settings.lr_wsd_decay_iters, settings.lr_wsd_decay_samples, 0)
    constant = settings.weight_decay_incr_style == "constant"
    if warmup >= decay:
        raise ValueError(
            f"the learning rate would warm up for {warmup} samples of a schedule of {decay}: lower "
            "--lr-warmup-fraction/--lr-warmup-iters or raise --lr-decay-iters/--train-iters"
        )
    return OptimizerParamScheduler(
        optimizer,
        init_lr=settings.lr_warmup_init,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=decay,
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay if constant else settings.start_weight_decay,
        end_wd=settings.weight_decay if constant else settings.end_weight_decay,
        wd_incr_steps=train_samples,
        wd_incr_style=settings.weight_decay_incr_style,
        # A resumed run takes the schedule from its flags, so that it can be made longer.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=wsd or None,
        lr_wsd_decay_style=settings.lr_wsd_decay_style,
    )
