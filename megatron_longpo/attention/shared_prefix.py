"""Attention over a shared-prefix row: the tiles of a plan, one kernel call each, merged by log-sum-exp.

Forward: partial results of a query over disjoint keys, each with its log-sum-exp l_i, merge exactly:
``out = Σ exp(l_i − l) out_i`` with ``l = log Σ exp(l_i)``; it is FlashAttention's own rescaling, between kernel calls.
Backward: every tile's kernel is given the merged out and l, so its gradients are those of the whole softmax already.
Letting autograd differentiate the merge instead, with its weights held constant, gives wrong dq and dk.
"""

# T=local queries S=keys of the row N=query heads G=key/value heads D=head_dim

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_longpo.attention.function import Gradients, RowAttention, Saved, check_shapes
from megatron_longpo.attention.kept import Result
from megatron_longpo.attention.kernels import AttentionKernel
from megatron_longpo.attention.tiles import Plan, Tile, plan
from megatron_longpo.config.training import FLASH
from megatron_longpo.data.layout import RowLayout
from megatron_longpo.ranges import BRANCH_ATTENTION, PREFIX_ATTENTION, named_range


def shared_prefix_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: RowLayout,
    scale: float,
    backend: str = FLASH,
) -> torch.Tensor:
    """Attention of a whole row that this rank holds in row order. No collectives.

    Args:
        q: ``[T, N, D]``, T = ``layout.padded_tokens``.
        k: ``[T, G, D]``, N a multiple of G.
        v: ``[T, G, D]``.
        layout: The row. Its context-parallel size only says how the row is padded.
        scale: Factor on the scores, ``1 / sqrt(D)`` as a rule.
        backend: The kernel, a value of ``--attention-backend``.

    Returns:
        ``[T, N, D]``, contiguous, in q's dtype; rows of padding are zero and pass no gradient.

    Raises:
        ValueError: Shapes do not fit the layout or each other.
    """
    check_shapes(q, k, v, layout.padded_tokens)
    return _WholeRow(layout, scale, backend=backend)(q, k, v)


@dataclass(frozen=True)
class _WholeRow(RowAttention):
    """All tiles of the row, on this rank; no collectives."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Result:
        """Output ``[T, N, D]`` and log-sum-exps ``[N, T]`` of the whole row."""
        return forward_tiles(q, k, v, plan(self.layout), self.scale, self.kernel(q))

    def backward(self, grad_out: torch.Tensor, saved: Saved, started: None) -> Gradients:
        """dq ``[T, N, D]``, dk and dv ``[T, G, D]`` of the whole row."""
        kernel = self.kernel(grad_out)
        return backward_tiles(grad_out, *saved, plan(self.layout), self.scale, kernel)


def forward_tiles(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tiles: Plan, scale: float, kernel: AttentionKernel
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a plan.

    Args:
        q: ``[T, N, D]``.
        k: ``[S, G, D]``.
        v: ``[S, G, D]``.
        tiles: A plan of T queries and S keys.
        scale: Factor on the scores.
        kernel: Computes one tile.

    Returns:
        Output ``[T, N, D]`` in q's dtype, log-sum-exp ``[N, T]`` in fp32 (fp64 for fp64); both zero for padding.
    """
    out, lse = empty_results(q)
    forward_into(out, lse, q, k, v, kernel.cut(tiles), scale, kernel)
    return out, lse


def empty_results(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of `forward_tiles`, not filled yet."""
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return out, torch.empty((q.shape[1], q.shape[0]), dtype=lse_dtype, device=q.device)


def forward_into(
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tiles: Plan,
    scale: float,
    kernel: AttentionKernel,
) -> None:
    """`forward_tiles` of a plan that the kernel has cut, with its results as the first arguments.

    They may be views, and hold earlier tiles' results.
    """
    for start, stop in tiles.unstored_queries:
        out[start:stop].zero_()
        lse[:, start:stop].zero_()
    for tile in tiles.tiles:
        rows, keys = tile.queries, tile.keys
        with named_range(BRANCH_ATTENTION if tile.of_branch else PREFIX_ATTENTION):
            tile_out, tile_lse = kernel.forward(
                _cut(q, rows, tile), _cut(k, keys, tile), _cut(v, keys, tile), tile.causal, scale
            )
            if tile.flipped:
                tile_out, tile_lse = tile_out.flip(0), tile_lse.flip(1)
            if tile.queries_first:
                out[rows].copy_(tile_out)
                lse[:, rows].copy_(tile_lse)
            else:
                _merge(out[rows], lse[:, rows], tile_out, tile_lse)


def _merge(out: torch.Tensor, lse: torch.Tensor, tile_out: torch.Tensor, tile_lse: torch.Tensor) -> None:
    """Merge a tile into ``out`` ``[Tq, N, D]`` and ``lse`` ``[N, Tq]`` in place, computing in the dtype of ``lse``.

    The weight of the tile, exp(l_tile) / (exp(l) + exp(l_tile)), is a sigmoid, which cannot overflow.
    """
    weight = torch.sigmoid(tile_lse - lse).t().unsqueeze(-1)
    out.copy_(torch.lerp(out.to(lse.dtype), tile_out.to(lse.dtype), weight))
    lse.copy_(torch.logaddexp(lse, tile_lse))


def backward_tiles(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    tiles: Plan,
    scale: float,
    kernel: AttentionKernel,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `forward_tiles`, whose arguments and results these are.

    Returns:
        dq ``[T, N, D]`` in q's dtype; dk and dv ``[S, G, D]``, in fp32 if several tiles add to them in half precision.
    """
    tiles = kernel.cut(tiles)
    key_dtype = torch.promote_types(k.dtype, torch.float32) if tiles.adds_keys else k.dtype
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.empty(k.shape, dtype=key_dtype, device=k.device)
    dv = torch.empty(v.shape, dtype=key_dtype, device=v.device)
    backward_into(dq, dk, dv, grad_out, q, k, v, out, lse, tiles, scale, kernel)
    return dq, dk, dv


def backward_into(
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    tiles: Plan,
    scale: float,
    kernel: AttentionKernel,
) -> None:
    """`backward_tiles` of a plan that the kernel has cut, with its results as the first arguments.

    They may be views, and hold earlier tiles' results.
    """
    for start, stop in tiles.unstored_queries:
        dq[start:stop].zero_()
    for start, stop in tiles.unstored_keys:
        dk[start:stop].zero_()
        dv[start:stop].zero_()
    for tile in tiles.tiles:
        rows, keys = tile.queries, tile.keys
        with named_range(BRANCH_ATTENTION if tile.of_branch else PREFIX_ATTENTION):
            gradients = kernel.backward(
                _cut(grad_out, rows, tile),
                _cut(q, rows, tile),
                _cut(k, keys, tile),
                _cut(v, keys, tile),
                _cut(out, rows, tile),
                lse[:, rows].flip(1) if tile.flipped else lse[:, rows],
                tile.causal,
                scale,
            )
            tile_dq, tile_dk, tile_dv = (x.flip(0) for x in gradients) if tile.flipped else gradients
            _store_or_add(dq[rows], tile_dq, tile.queries_first)
            _store_or_add(dk[keys], tile_dk, tile.keys_first)
            _store_or_add(dv[keys], tile_dv, tile.keys_first)


def _cut(x: torch.Tensor, tokens: slice, tile: Tile) -> torch.Tensor:
    """A tile's tokens of a row tensor: a view, or for a flipped tile a copy backwards in time."""
    return x[tokens].flip(0) if tile.flipped else x[tokens]


def _store_or_add(total: torch.Tensor, part: torch.Tensor, first: bool) -> None:
    if first:
        total.copy_(part)
    else:
        total.add_(part)
