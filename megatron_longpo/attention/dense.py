"""The plain twin of shared-prefix attention: one mask, one softmax. It allocates [T, T]; for tests."""

# T=tokens N=query heads M=key/value heads D=head_dim

from __future__ import annotations

import torch

from megatron_longpo.data.layout import PREFIX, RowLayout


def dense_mask(layout: RowLayout) -> torch.Tensor:
    """Which key every query of a row sees: bool ``[T, T]`` in row order; rows and columns of padding are False."""
    size = layout.padded_tokens
    mask = torch.zeros(size, size, dtype=torch.bool)
    for segment in layout.segments:
        own = slice(segment.start, segment.stop)
        mask[own, own] = torch.ones(segment.num_tokens, segment.num_tokens, dtype=torch.bool).tril()
        if segment.branch != PREFIX:
            mask[own, segment.prefix_start : segment.prefix_start + segment.prefix_tokens] = True
    return mask


def dense_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: RowLayout, scale: float | None = None
) -> torch.Tensor:
    """softmax(q·kᵀ·scale)·v under `dense_mask`.

    Args:
        q: ``[T, N, D]``, the whole padded row.
        k: ``[T, M, D]``, M dividing N.
        v: Like ``k``.
        layout: The row.
        scale: 1/√D by default.

    Returns:
        ``[T, N, D]``; 0 at padding.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    mask = dense_mask(layout).to(q.device)
    scores = (torch.einsum("qnd,knd->nqk", q, k) * scale).masked_fill(~mask, -torch.inf)
    probabilities = scores.softmax(dim=-1).masked_fill(~mask.any(dim=1)[:, None], 0.0)
    return torch.einsum("nqk,knd->qnd", probabilities, v)
