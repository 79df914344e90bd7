"""Shared-prefix attention for any context-parallel size: the choice of ``--cp-comm-type``."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_longpo.attention.all_gather import all_gather_attention
from megatron_longpo.attention.all_to_all import all_to_all_attention
from megatron_longpo.attention.hierarchical import Hierarchy, hierarchical_attention
from megatron_longpo.attention.ring import ring_attention
from megatron_longpo.attention.shared_prefix import shared_prefix_attention
from megatron_longpo.config.parallel import CP_COMM_TYPES, HIERARCHICAL
from megatron_longpo.config.training import FLASH
from megatron_longpo.data.layout import RowLayout

_FLAT = {"all_gather": all_gather_attention, "a2a": all_to_all_attention, "p2p": ring_attention}


def context_parallel_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: RowLayout,
    cp_group: dist.ProcessGroup | None,
    comm_type: str,
    scale: float,
    hierarchy: Hierarchy | None = None,
    backend: str = FLASH,
) -> torch.Tensor:
    """Attention of the tokens that this rank holds, on the whole row.

    Collectives: those of `all_gather_attention`, `all_to_all_attention`, `ring_attention` or `hierarchical_attention`;
    none at size 1.

    Args:
        q: ``[local_tokens, heads, head_dim]``, in the rank's local order (``RowLayout.chunks``).
        k: ``[local_tokens, kv_heads, head_dim]``.
        v: ``[local_tokens, kv_heads, head_dim]``.
        layout: The whole row.
        cp_group: The context-parallel group; None means a size of 1.
        comm_type: A value of ``--cp-comm-type``; of no effect at size 1.
        scale: Factor on the scores.
        hierarchy: The two groups of ``a2a+p2p``.
        backend: The kernel, a value of ``--attention-backend``.

    Returns:
        ``[local_tokens, heads, head_dim]``.

    Raises:
        ValueError: Unknown ``comm_type``; sizes of layout, group and tensors that do not fit.
    """
    cp_size = dist.get_world_size(cp_group) if cp_group is not None else 1
    if layout.cp_size != cp_size:
        raise ValueError(
            f"a row laid out for {layout.cp_size} context-parallel ranks in a group of {cp_size}: build the batch with "
            "the --context-parallel-size of the model"
        )
    if cp_group is None or cp_size == 1:
        return shared_prefix_attention(q, k, v, layout, scale, backend)
    if comm_type not in CP_COMM_TYPES:
        raise ValueError(f"--cp-comm-type {comm_type!r} is not one of {', '.join(CP_COMM_TYPES)}")
    if comm_type == HIERARCHICAL:
        if hierarchy is None:
            raise ValueError(f"--cp-comm-type {HIERARCHICAL} needs --hierarchical-context-parallel-sizes")
        return hierarchical_attention(q, k, v, layout, hierarchy, scale, backend)
    return _FLAT[comm_type](q, k, v, layout, cp_group, scale, backend)
