"""Process groups and seeds of a run, and what its nodes have in common."""

from __future__ import annotations

import contextlib
import datetime
import os
import random
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_longpo import platform
from megatron_longpo.config import RunConfig
from megatron_longpo.files import temporary_name

_LATEST_S = 10.0
"""How late a file may show on another node: network file systems keep what they know of a folder for seconds."""


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
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


@contextlib.contextmanager
def process_groups(config: RunConfig) -> Iterator[None]:
    """`initialize` before the block, `shut_down` behind it; not after an error, unless this rank is alone.

    To leave a group is a collective under NCCL: this rank would wait for others, which wait for it in another one.
    """
    initialize(config)
    try:
        yield
    except BaseException:
        if world_size() == 1:
            shut_down()
        raise
    shut_down()


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


def nodes_that_differ(value: Any) -> list[str]:
    """The nodes on which a rank has another value than rank 0, by name: 1 all-gather of Python objects."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (socket.gethostname(), value))
    return sorted({node for node, theirs in gathered if theirs != gathered[0][1]})


def require_shared(folder: str | Path, flag: str) -> None:
    """Refuse a folder that is not the same on all nodes: each would keep what its own ranks write.

    Collectives: 1 broadcast and 1 all-gather of Python objects.

    Args:
        folder: It exists, and rank 0 can write there.
        flag: Where it was given, for the message.

    Raises:
        ValueError: A rank does not see what rank 0 writes. All ranks raise it.
    """
    if dist.get_world_size() == 1:
        return
    probe = temporary_name(Path(folder) / "shared")
    names = [probe.name, socket.gethostname()]
    try:
        if is_rank_0():
            probe.touch()
        dist.broadcast_object_list(names, src=0)
        seen, deadline = Path(folder) / names[0], time.monotonic() + _LATEST_S
        while not (found := seen.exists()) and time.monotonic() < deadline:
            time.sleep(0.1)
        lost = nodes_that_differ(found)
    finally:
        if is_rank_0():
            probe.unlink(missing_ok=True)
    if lost:
        raise ValueError(
            f"{flag} {folder} is another folder on {', '.join(lost)} than on {names[1]}: give one on a file system "
            "that all nodes share"
        )
