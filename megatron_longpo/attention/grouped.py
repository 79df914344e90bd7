"""Short rectangles of grouped-query attention with the query heads of a group laid behind one another as queries.

Without a mask nothing tells the tokens of a rectangle apart, so the N / G heads that share a key/value head may as well
be N / G times as many queries of that one head. Two responses of a few hundred tokens on a long prefix are too few
queries to fill a kernel's block; folded, they fill it, each key block is read once per group instead of once per head,
and kernels that repeat key/value heads (or their gradients) have nothing to repeat.
"""

# Tq=queries Tk=keys N=query heads G=key/value heads R=N/G D=head_dim

from __future__ import annotations

import torch

from megatron_longpo.attention.kernels import AttentionKernel
from megatron_longpo.attention.tiles import Plan


class FoldedRectangles(AttentionKernel):
    """Another kernel, whose short rectangles are folded; causal squares and long rectangles go to it as they are.

    Args:
        kernel: Computes the result.
        below_queries: Fold rectangles of fewer queries. torch's CPU kernel has its largest block, 256 queries, from 768
            on, and then the copies that folding makes buy nothing.
    """

    def __init__(self, kernel: AttentionKernel, below_queries: int = 768) -> None:
        self.kernel = kernel
        self.below_queries = below_queries

    def cut(self, tiles: Plan) -> Plan:
        """As the other kernel wants it."""
        return self.kernel.cut(tiles)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `AttentionKernel.forward`; a short rectangle as ``[Tq * R, G, D]`` queries of G heads."""
        if not self._folds(q, k, causal):
            return self.kernel.forward(q, k, v, causal, scale)
        groups = k.shape[1]
        out, lse = self.kernel.forward(_fold(q, groups), k, v, False, scale)
        return _unfold(out, q), lse.unflatten(1, (q.shape[0], -1)).transpose(1, 2).flatten(0, 1)

    def backward(
        self,
        grad_out: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        causal: bool,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `AttentionKernel.backward`; folds whatever `forward` folds."""
        if not self._folds(q, k, causal):
            return self.kernel.backward(grad_out, q, k, v, out, lse, causal, scale)
        groups = k.shape[1]
        folded_lse = lse.unflatten(0, (groups, -1)).transpose(1, 2).flatten(1, 2)
        dq, dk, dv = self.kernel.backward(
            _fold(grad_out, groups), _fold(q, groups), k, v, _fold(out, groups), folded_lse, False, scale
        )
        return _unfold(dq, q), dk, dv

    def _folds(self, q: torch.Tensor, k: torch.Tensor, causal: bool) -> bool:
        return not causal and q.shape[1] > k.shape[1] and q.shape[0] < self.below_queries


def _fold(x: torch.Tensor, groups: int) -> torch.Tensor:
    """``[Tq, N, D]`` to ``[Tq * R, G, D]``."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(0, 1)


def _unfold(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``[Tq * R, G, D]`` back to ``[Tq, N, D]``."""
    return x.unflatten(0, (like.shape[0], -1)).transpose(1, 2).flatten(1, 2)
