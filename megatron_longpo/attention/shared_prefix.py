"""Shared-prefix attention on one rank: tiles computed by a kernel, merged by log-sum-exp, differentiated as one.

It is one autograd function because its backward must call every tile's kernel with the log-sum-exp and output of the
WHOLE row of the mask. Merging parts with ordinary autograd and weights taken as constants looks right, and has wrong
query and key gradients: the weights depend on them.
"""

# Tq=queries that this rank holds Tk=keys of the whole row N=query heads M=key/value heads D=head_dim

from __future__ import annotations

from typing import Any

import torch

from megatron_longpo.attention.kernels import AttentionKernel, select_kernel
from megatron_longpo.attention.tiles import QueryBlock, plan
from megatron_longpo.data.layout import RowLayout


def shared_prefix_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: RowLayout,
    scale: float | None = None,
    cp_rank: int | None = None,
    kernel: AttentionKernel | None = None,
) -> torch.Tensor:
    """Attention of a row under the shared-prefix mask. No collectives.

    Args:
        q: ``[Tq, N, D]``; the whole padded row, or the tokens that context-parallel rank ``cp_rank`` holds.
        k: ``[Tk, M, D]``; the whole padded row in row order, M dividing N.
        v: Like ``k``.
        layout: Where prefix and branches lie.
        scale: Factor on the scores; 1/√D by default.
        cp_rank: Whose queries ``q`` holds; None is the whole row.
        kernel: Computes the tiles; chosen by device and dtype by default.

    Returns:
        ``[Tq, N, D]``; 0 at padding.
    """
    if scale is None:
        scale = q.shape[-1] ** -0.5
    return _TiledAttention.apply(q, k, v, plan(layout, cp_rank), scale, kernel or select_kernel(q.device, q.dtype))


class _TiledAttention(torch.autograd.Function):
    """Attention over a plan of tiles."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        blocks: tuple[QueryBlock, ...],
        scale: float,
        kernel: AttentionKernel,
    ) -> torch.Tensor:
        covered = sum(block.stop - block.start for block in blocks) == len(q)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[:2], dtype=_accumulator(q.dtype), device=q.device)
        if not covered:
            out.zero_(), lse.zero_()
        for block in blocks:
            rows = slice(block.start, block.stop)
            out[rows], lse[rows] = _merged(q, k, v, block, scale, kernel)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.blocks, ctx.scale, ctx.kernel, ctx.covered = blocks, scale, kernel, covered
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        make = torch.empty if ctx.covered else torch.zeros
        grad_q = make(q.shape, dtype=q.dtype, device=q.device)
        # Tiles of many queries add up in a key's gradient.
        grad_k = torch.zeros(k.shape, dtype=lse.dtype, device=k.device)
        grad_v = torch.zeros(v.shape, dtype=lse.dtype, device=v.device)
        for block in ctx.blocks:
            block_grad: torch.Tensor | None = None
            for tile in block.tiles:
                rows, keys = slice(tile.query_start, tile.query_stop), slice(tile.key_start, tile.key_stop)
                tile_q, tile_k, tile_v = ctx.kernel.backward(
                    grad_out[rows], q[rows], k[keys], v[keys], out[rows], lse[rows], tile.causal, ctx.scale
                )
                grad_k[keys] += tile_k
                grad_v[keys] += tile_v
                if block_grad is None:
                    block_grad = tile_q if len(block.tiles) == 1 else tile_q.to(lse.dtype)
                else:
                    block_grad[tile.query_start - block.start : tile.query_stop - block.start] += tile_q
            grad_q[block.start : block.stop] = block_grad
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None, None, None


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _merged(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: QueryBlock, scale: float, kernel: AttentionKernel
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of one block over all of its tiles."""
    out: torch.Tensor | None = None
    lse: torch.Tensor | None = None
    for tile in block.tiles:
        rows, keys = slice(tile.query_start, tile.query_stop), slice(tile.key_start, tile.key_stop)
        tile_out, tile_lse = kernel.forward(q[rows], k[keys], v[keys], tile.causal, scale)
        if out is None or lse is None:
            if len(block.tiles) == 1:
                return tile_out, tile_lse
            out, lse = tile_out.to(tile_lse.dtype), tile_lse.clone()
            continue
        here = slice(tile.query_start - block.start, tile.query_stop - block.start)
        total = torch.logaddexp(lse[here], tile_lse)
        out[here].mul_((lse[here] - total).exp()[..., None])
        out[here].add_(tile_out * (tile_lse - total).exp()[..., None])
        lse[here] = total
    assert out is not None and lse is not None
    return out, lse
