"""Making a process ready for Megatron-Core on its device."""

from __future__ import annotations

import os

import torch

from megatron_longpo.platform.checkpoint_writers import (
    tie_checkpoint_writers_to_their_rank,
    write_checkpoints_in_threads,
)
from megatron_longpo.platform.cpu_patches import replace_grad_clipping, use_cpu_rng_tracker, use_torch_optimizers
from megatron_longpo.platform.cpu_torch import install_cpu_torch
from megatron_longpo.platform.devices import device, has_cuda
from megatron_longpo.platform.megatron_core import require_checked_version
from megatron_longpo.platform.newer_megatron import (
    let_blocks_recompute_themselves,
    match_groups_without_rates,
    name_the_cause_of_failed_writes,
)
from megatron_longpo.platform.optimizer_shards import let_ranks_write_their_own_shards
from megatron_longpo.platform.repairs import (
    count_missing_te_as_old,
    fix_zero1_resume,
    group_ranks_without_einops,
    let_checkpoints_name_optimizers,
    let_hybrid_optimizer_resume,
    norm_gradients_without_waiting,
    pin_weights_on_host,
)

_prepared = False


def prepare(use_cpu: bool = False) -> None:
    """Make this process ready for Megatron-Core on its device. Call it once, before any model is built.

    Args:
        use_cpu: Hide the GPU.

    Raises:
        RuntimeError: On a CPU with a Megatron-Core release that the adapters were not checked against.
    """
    global _prepared
    if use_cpu:
        os.environ["LONGPO_USE_CPU"] = "1"
    if has_cuda():
        torch.cuda.set_device(device())
    if _prepared:
        return
    require_checked_version()
    let_checkpoints_name_optimizers()  # those that Megatron has found, used or not
    if not has_cuda():
        use_torch_optimizers()
        install_cpu_torch()
        use_cpu_rng_tracker()
        replace_grad_clipping()
    group_ranks_without_einops()
    count_missing_te_as_old()
    fix_zero1_resume()
    let_hybrid_optimizer_resume()
    norm_gradients_without_waiting()
    pin_weights_on_host()
    let_ranks_write_their_own_shards()
    write_checkpoints_in_threads()
    tie_checkpoint_writers_to_their_rank()
    let_blocks_recompute_themselves()
    name_the_cause_of_failed_writes()
    match_groups_without_rates()
    _prepared = True
