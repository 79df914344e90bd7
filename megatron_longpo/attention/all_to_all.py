"""Context parallelism by exchanging heads for tokens, as DeepSpeed-Ulysses does (arXiv 2309.14509).

Before attention every rank gives away its tokens of other ranks' heads and receives the whole row for its own heads;
attention is then local; afterwards the output goes the way back. The two exchanges are each other's adjoint.
"""

# t=local tokens T=tokens of all ranks H=heads of all ranks h=H/ranks D=head_dim

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megatron_longpo.attention.function import check_shapes
from megatron_longpo.attention.row_order import to_rank_order, to_row_order
from megatron_longpo.attention.shared_prefix import shared_prefix_attention
from megatron_longpo.config.training import FLASH
from megatron_longpo.data.layout import RowLayout
from megatron_longpo.ranges import COMM, named_range


def all_to_all_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: RowLayout,
    cp_group: dist.ProcessGroup,
    scale: float,
    backend: str = FLASH,
) -> torch.Tensor:
    """Attention for ``--cp-comm-type a2a``; arguments and result are those of `context_parallel_attention`.

    Collectives: 2 CP all-to-alls forward, 2 backward. Q, K and V travel together.

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
    exchange = HeadExchange(cp_group, layout.cp_size, to_row_order(layout, q.device), to_rank_order(layout, q.device))
    row_q, row_k, row_v = tokens_to_heads(exchange, q, k, v)
    return heads_to_tokens(exchange, shared_prefix_attention(row_q, row_k, row_v, layout, scale, backend))


@dataclass(frozen=True)
class HeadExchange:
    """A group that exchanges heads for tokens.

    Args:
        group: Its ranks.
        num_ranks: How many they are.
        joint_order: int64 ``[T]``; ``by_rank[joint_order]`` puts the concatenation of all ranks' tokens into the order
            in which they are held together.
        rank_order: int64 ``[T]``, its inverse.
    """

    group: dist.ProcessGroup
    num_ranks: int
    joint_order: torch.Tensor
    rank_order: torch.Tensor


def tokens_to_heads(exchange: HeadExchange, *local: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Each ``[t, H, D]`` of this rank's tokens to ``[T, h, D]``, all tokens for this rank's heads.

    Collectives: 1 all-to-all forward, 1 backward.
    """
    return _TokensToHeads.apply(exchange, *local)


def heads_to_tokens(exchange: HeadExchange, joint: torch.Tensor) -> torch.Tensor:
    """``[T, h, D]`` back to ``[t, H, D]``. Collectives: 1 all-to-all forward, 1 backward."""
    return _HeadsToTokens.apply(exchange, joint)


class _TokensToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: HeadExchange, *local: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Each ``[t, H, D]`` to ``[T, h, D]``: 1 all-to-all for all of them."""
        ctx.exchange = exchange
        return _tokens_to_heads(local, exchange)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *joint: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients ``[T, h, D]`` back to ``[t, H, D]``: 1 all-to-all, the inverse exchange."""
        return None, *_heads_to_tokens(joint, ctx.exchange)


class _HeadsToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: HeadExchange, joint: torch.Tensor) -> torch.Tensor:
        """``[T, h, D]`` to ``[t, H, D]``: 1 all-to-all."""
        ctx.exchange = exchange
        (local,) = _heads_to_tokens((joint,), exchange)
        return local

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, local: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradient ``[t, H, D]`` back to ``[T, h, D]``: 1 all-to-all, the inverse exchange."""
        return None, *_tokens_to_heads((local,), ctx.exchange)


def _tokens_to_heads(local: tuple[torch.Tensor, ...], exchange: HeadExchange) -> tuple[torch.Tensor, ...]:
    """Rank r gets heads r * h to (r + 1) * h of every tensor."""
    by_head_rank = torch.cat([x.unflatten(1, (exchange.num_ranks, -1)) for x in local], 2).transpose(0, 1)
    by_token_rank = _exchange(by_head_rank, exchange.group).flatten(0, 1)
    parts = by_token_rank.split([x.shape[1] // exchange.num_ranks for x in local], 1)
    return tuple(part.index_select(0, exchange.joint_order) for part in parts)


def _heads_to_tokens(joint: tuple[torch.Tensor, ...], exchange: HeadExchange) -> tuple[torch.Tensor, ...]:
    by_rank = torch.cat([x.index_select(0, exchange.rank_order) for x in joint], 1)
    by_head_rank = _exchange(by_rank.unflatten(0, (exchange.num_ranks, -1)), exchange.group).transpose(0, 1)
    parts = by_head_rank.split([x.shape[1] for x in joint], 2)
    return tuple(part.flatten(1, 2).contiguous() for part in parts)


def _exchange(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Send ``x[i]`` to rank i of the group; returns what rank i sent at index i. 1 all-to-all."""
    x = x.contiguous()
    received = torch.empty_like(x)
    with named_range(COMM):
        dist.all_to_all_single(received, x, group=group)
    return received
