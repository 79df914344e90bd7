"""The plain twin of shared-prefix attention, for tests: one boolean mask, one softmax, scores of [T, T] in memory."""

# T=tokens of the padded row N=query heads G=key/value heads D=head_dim

from __future__ import annotations

import torch

from megatron_longpo.data.layout import PREFIX, RowLayout


def dense_mask(layout: RowLayout) -> torch.Tensor:
    """Which key every query sees: bool ``[T, T]``, queries first, row order. Rows and columns of padding are False."""
    mask = torch.zeros(layout.padded_tokens, layout.padded_tokens, dtype=torch.bool)
    for segment in layout.segments:
        own = slice(segment.start, segment.stop)
        mask[own, own] = torch.ones(segment.num_tokens, segment.num_tokens, dtype=torch.bool).tril()
        if segment.branch != PREFIX:
            mask[own, segment.prefix_start : segment.prefix_start + segment.prefix_tokens] = True
    if layout.window_tokens is not None:
        positions = layout.position_ids()
        mask &= positions[:, None] - positions[None, :] < layout.window_tokens
    return mask


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: RowLayout, scale: float) -> torch.Tensor:
    """What `shared_prefix_attention` computes, from the same arguments, differentiated by autograd.

    Args:
        q: ``[T, N, D]``.
        k: ``[T, G, D]``.
        v: ``[T, G, D]``.
        layout: The row.
        scale: Factor on the scores.

    Returns:
        ``[T, N, D]``; zero for padding.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    mask = dense_mask(layout).to(q.device)
    scores = torch.einsum("qnd,knd->nqk", q, k) * scale
    # A finite filler and a second masking, so that a row of padding comes out as zeros and not as NaN.
    weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1) * mask
    return torch.einsum("nqk,knd->qnd", weights, v)
