"""Process groups and seeds of a run."""

from __future__ import annotations

import datetime
import os
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_longpo import platform
from megatron_longpo.config import RunConfig


def world_size() -> int:
    """Processes of this run, as torchrun tells them; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def initialize(config: RunConfig) -> None:
    """Start the process group and Megatron's parallel state, and seed every generator.

    Without torchrun's environment it is a world of one process.
    """
    platform.prepare(config.training.use_cpu)
    parallel = config.parallel
    if not dist.is_initialized():
        alone: dict[str, Any] = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        timeout = datetime.timedelta(minutes=parallel.distributed_timeout_minutes)
        dist.init_process_group(parallel.distributed_backend, timeout=timeout, **alone)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=config.num_virtual_stages,
        context_parallel_size=parallel.context_parallel_size,
        hierarchical_context_parallel_sizes=list(parallel.hierarchical_context_parallel_sizes or ()) or None,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
        create_gloo_process_groups=False,  # for gathering optimizer state in host memory: see platform.optimizer_shards
    )
    # Pipeline stages draw different weights; tensor-parallel ranks differ through Megatron's tracker.
    seed = config.training.seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def shut_down() -> None:
    """Leave Megatron's parallel state and the process group."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def is_rank_0() -> bool:
    """Whether this process prints and writes files."""
    return int(os.environ.get("RANK", "0")) == 0


def broadcast_from_last_stage(tensor: torch.Tensor) -> torch.Tensor:
    """Give every pipeline rank what its last stage holds, in place: 1 broadcast over the pipeline group."""
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        dist.broadcast(
            tensor,
            parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
    return tensor


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank of the world: 1 all-reduce."""
    tensor = torch.tensor([float(flag)], device=platform.device())
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return bool(tensor.item())
