"""Context parallelism in two levels: heads for tokens among neighbours, a ring between them (``a2a+p2p``).

The A ranks of one inner group exchange heads for tokens, so that each holds the group's tokens for 1/A of the heads; P
such groups form rings over these tokens (the hybrid of USP, arXiv 2405.07719). The fast exchange stays inside a node,
and the ring needs only P steps. The zigzag chunks of A neighbouring ranks are two longer zigzag chunks, so what a group
holds is what one rank of a row over P ranks holds.
"""

# A=ranks of the inner group P=ranks of the ring

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_longpo.attention.all_to_all import HeadExchange, heads_to_tokens, tokens_to_heads
from megatron_longpo.attention.function import check_shapes
from megatron_longpo.attention.ring import ring_attention
from megatron_longpo.attention.row_order import from_group_order, to_group_order
from megatron_longpo.config.training import FLASH
from megatron_longpo.data.layout import RowLayout

Hierarchy = tuple[dist.ProcessGroup, dist.ProcessGroup]
"""The group of A neighbouring ranks, and the ring of P ranks with the same place in their groups, as Megatron's
``get_hierarchical_context_parallel_groups`` makes them."""


def hierarchical_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: RowLayout,
    hierarchy: Hierarchy,
    scale: float,
    backend: str = FLASH,
) -> torch.Tensor:
    """Attention for ``--cp-comm-type a2a+p2p``; arguments and result are those of `context_parallel_attention`.

    Collectives: 2 all-to-alls in the inner group forward, 2 backward; those of `ring_attention` on P ranks.

    Raises:
        ValueError: The key/value heads do not divide over A; sizes that do not fit each other.
    """
    check_shapes(q, k, v, layout.local_tokens)
    inner, ring = hierarchy
    inner_size, ring_size = dist.get_world_size(inner), dist.get_world_size(ring)
    if inner_size * ring_size != layout.cp_size:
        raise ValueError(
            f"--hierarchical-context-parallel-sizes {inner_size} {ring_size} must multiply to "
            f"--context-parallel-size {layout.cp_size}"
        )
    if k.shape[1] % inner_size:
        raise ValueError(
            f"--cp-comm-type a2a+p2p splits heads over {inner_size} ranks, but {k.shape[1]} key/value heads per "
            "tensor-parallel rank are no multiple of it: lower the first of --hierarchical-context-parallel-sizes, or "
            "use --cp-comm-type p2p"
        )
    grouped = layout.over(ring_size)
    number = dist.get_rank(ring)
    exchange = HeadExchange(
        inner,
        inner_size,
        to_group_order(layout, ring_size, number, q.device),
        from_group_order(layout, ring_size, number, q.device),
    )
    group_q, group_k, group_v = tokens_to_heads(exchange, q, k, v)
    return heads_to_tokens(exchange, ring_attention(group_q, group_k, group_v, grouped, ring, scale, backend))
