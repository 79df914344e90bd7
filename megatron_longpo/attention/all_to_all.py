"""Context parallelism by exchanging heads for tokens, as DeepSpeed-Ulysses does (arXiv 2309.14509).

Before attention every rank gives away its tokens of other ranks' heads and receives the whole row for its own heads;
attention is then local; afterwards the output goes the way back. The two exchanges are each other's adjoint.
"""

# t=local tokens T=tokens of the row H=heads of all ranks h=H/cp D=head_dim

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megatron_longpo.attention.row_order import to_rank_order, to_row_order
from megatron_longpo.attention.shared_prefix import check_shapes, shared_prefix_attention
from megatron_longpo.data.layout import RowLayout
from megatron_longpo.ranges import COMM, named_range


def all_to_all_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: RowLayout, cp_group: dist.ProcessGroup, scale: float
) -> torch.Tensor:
    """Attention of this rank's queries on the whole row.

    Collectives: 2 CP all-to-alls forward, 2 backward. Q, K and V travel together.

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
        ValueError: The key/value heads do not divide over the ranks; shapes do not fit the layout or each other.
    """
    check_shapes(q, k, v, layout.local_tokens)
    if k.shape[1] % layout.cp_size:
        raise ValueError(
            f"--cp-comm-type a2a splits heads over context-parallel ranks, but {k.shape[1]} key/value heads per "
            f"tensor-parallel rank are no multiple of --context-parallel-size {layout.cp_size}: "
            "use --cp-comm-type all_gather, or smaller --tensor-model-parallel-size or --context-parallel-size"
        )
    row_q, row_k, row_v = _TokensToHeads.apply(layout, cp_group, q, k, v)
    return _HeadsToTokens.apply(layout, cp_group, shared_prefix_attention(row_q, row_k, row_v, layout, scale))


class _TokensToHeads(torch.autograd.Function):
    """Local tokens of all heads to the row for this rank's heads. 1 CP all-to-all forward, 1 backward."""

    @staticmethod
    def forward(
        ctx: Any, layout: RowLayout, cp_group: dist.ProcessGroup, *local: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.layout, ctx.cp_group = layout, cp_group
        return _tokens_to_heads(local, layout, cp_group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *row: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, *_heads_to_tokens(row, ctx.layout, ctx.cp_group)


class _HeadsToTokens(torch.autograd.Function):
    """The row for this rank's heads to local tokens of all heads. 1 CP all-to-all forward, 1 backward."""

    @staticmethod
    def forward(ctx: Any, layout: RowLayout, cp_group: dist.ProcessGroup, row: torch.Tensor) -> torch.Tensor:
        ctx.layout, ctx.cp_group = layout, cp_group
        (local,) = _heads_to_tokens((row,), layout, cp_group)
        return local

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, local: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, *_tokens_to_heads((local,), ctx.layout, ctx.cp_group)


def _tokens_to_heads(
    local: tuple[torch.Tensor, ...], layout: RowLayout, cp_group: dist.ProcessGroup
) -> tuple[torch.Tensor, ...]:
    """Each ``[t, H, D]`` to ``[T, h, D]`` in row order; rank r gets heads r * h to (r + 1) * h of every tensor."""
    by_head_rank = torch.cat([x.unflatten(1, (layout.cp_size, -1)) for x in local], 2).transpose(0, 1)
    by_token_rank = _exchange(by_head_rank, cp_group).flatten(0, 1)
    index = to_row_order(layout, by_token_rank.device)
    parts = by_token_rank.split([x.shape[1] // layout.cp_size for x in local], 1)
    return tuple(part.index_select(0, index) for part in parts)


def _heads_to_tokens(
    row: tuple[torch.Tensor, ...], layout: RowLayout, cp_group: dist.ProcessGroup
) -> tuple[torch.Tensor, ...]:
    """Each ``[T, h, D]`` in row order to ``[t, H, D]``."""
    index = to_rank_order(layout, row[0].device)
    by_token_rank = torch.cat([x.index_select(0, index) for x in row], 1).unflatten(0, (layout.cp_size, -1))
    by_head_rank = _exchange(by_token_rank, cp_group).transpose(0, 1)
    parts = by_head_rank.split([x.shape[1] for x in row], 2)
    return tuple(part.flatten(1, 2).contiguous() for part in parts)


def _exchange(x: torch.Tensor, cp_group: dist.ProcessGroup) -> torch.Tensor:
    """Send ``x[i]`` of ``[cp, ...]`` to rank i; returns what rank i sent at index i. 1 CP all-to-all."""
    x = x.contiguous()
    received = torch.empty_like(x)
    with named_range(COMM):
        dist.all_to_all_single(received, x, group=cp_group)
    return received
