"""Context parallelism by gathering keys and values, as Llama 3 was trained (arXiv 2407.21783, section 3.3.2).

Every rank keeps its zigzag queries and gathers the keys and values of the whole row, layer by layer. With grouped
queries those are small. Only local shards are saved: backward gathers again and reduce-scatters the gradients.
"""

# t=local tokens T=tokens of the row N=query heads G=key/value heads D=head_dim

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megatron_longpo.attention.kept import computed_once
from megatron_longpo.attention.row_order import to_rank_order, to_row_order
from megatron_longpo.attention.selection import select_kernel
from megatron_longpo.attention.shared_prefix import backward_tiles, check_shapes, compact, forward_tiles
from megatron_longpo.attention.tiles import plan
from megatron_longpo.data.layout import RowLayout
from megatron_longpo.ranges import COMM, named_range

# torch 2.13 renamed both.
_all_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
_reduce_scatter = dist.reduce_scatter_single if hasattr(dist, "reduce_scatter_single") else dist.reduce_scatter_tensor


def all_gather_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: RowLayout, cp_group: dist.ProcessGroup, scale: float
) -> torch.Tensor:
    """Attention of this rank's queries on the whole row.

    Collectives: 1 CP all-gather forward; 1 CP all-gather and 1 CP reduce-scatter backward. K and V travel together.
    Recomputed with its results kept (`kept.KeptResults`) it communicates nothing.

    Args:
        q: ``[t, N, D]``, in the rank's local order.
        k: ``[t, G, D]``, likewise.
        v: ``[t, G, D]``, likewise.
        layout: The whole row.
        cp_group: The context-parallel group, of ``layout.cp_size`` ranks.
        scale: Factor on the scores.

    Returns:
        ``[t, N, D]``.

    Raises:
        ValueError: Shapes do not fit the layout or each other.
    """
    check_shapes(q, k, v, layout.local_tokens)
    return _AllGatherAttention.apply(q, k, v, layout, cp_group, scale)


class _AllGatherAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: RowLayout,
        cp_group: dist.ProcessGroup,
        scale: float,
    ) -> torch.Tensor:
        q, k, v = compact(q), compact(k), compact(v)
        tiles = plan(layout, dist.get_rank(cp_group))
        kernel = select_kernel(q.device, q.dtype)

        def attend() -> tuple[torch.Tensor, torch.Tensor]:
            return forward_tiles(q, *_gather_row(k, v, layout, cp_group), tiles, scale, kernel)

        out, lse = computed_once(attend)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.layout, ctx.cp_group, ctx.scale = layout, cp_group, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        row_k, row_v = _gather_row(k, v, ctx.layout, ctx.cp_group)
        tiles = plan(ctx.layout, dist.get_rank(ctx.cp_group))
        kernel = select_kernel(q.device, q.dtype)
        dq, row_dk, row_dv = backward_tiles(grad_out, q, row_k, row_v, out, lse, tiles, ctx.scale, kernel)
        dk, dv = _sum_local(row_dk, row_dv, ctx.layout, ctx.cp_group)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _gather_row(
    k: torch.Tensor, v: torch.Tensor, layout: RowLayout, cp_group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Local ``[t, G, D]`` to two views ``[T, G, D]`` in row order. 1 CP all-gather."""
    local = torch.stack((k, v), 1)
    by_rank = local.new_empty((layout.padded_tokens, *local.shape[1:]))
    with named_range(COMM):
        _all_gather(by_rank, local, group=cp_group)
    row_k, row_v = by_rank.index_select(0, to_row_order(layout, k.device)).unbind(1)
    return row_k, row_v


def _sum_local(
    row_dk: torch.Tensor, row_dv: torch.Tensor, layout: RowLayout, cp_group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Partial gradients ``[T, G, D]`` in row order to their sums ``[t, G, D]`` for this rank. 1 CP reduce-scatter.

    Half precision is summed in fp32; on every rank, for a rank whose plan adds nothing up comes with half precision.
    """
    dtype = torch.promote_types(row_dk.dtype, torch.float32)
    row = torch.stack((row_dk.to(dtype), row_dv.to(dtype)), 1)
    by_rank = row.index_select(0, to_rank_order(layout, row.device))
    local = by_rank.new_empty((layout.local_tokens, *by_rank.shape[1:]))
    with named_range(COMM):
        _reduce_scatter(local, by_rank, group=cp_group)
    dk, dv = local.unbind(1)
    return dk, dv
