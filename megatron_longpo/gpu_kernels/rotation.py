"""Rotary position embedding in one pass."""

# T=tokens N=heads D=head_dim

from __future__ import annotations

import torch
import triton
import triton.language as tl

_HEADS = 16
"""Of a program; they share its cosines and sines."""


def rotated(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The halves ``(a, b)`` of every head as ``(a cos - b sin, b cos + a sin)``, computed in fp32 and rounded once.

    Args:
        heads: ``[T, 1, N, D]``, fp32, bf16 or fp16 on CUDA; copied if its last dimension is not contiguous.
        cos: fp32 ``[T, 1, 1, D / 2]``, contiguous.
        sin: Likewise.

    Returns:
        ``[T, 1, N, D]``, contiguous.
    """
    assert cos.is_contiguous() and sin.is_contiguous()
    if heads.stride(-1) != 1:
        heads = heads.contiguous()
    tokens, _, num_heads, width = heads.shape
    result = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
    if result.numel():
        grid = tokens, triton.cdiv(num_heads, _HEADS)
        strides = heads.stride(0), heads.stride(2)
        half = width // 2
        sizes = {"HALF": half, "BLOCK": triton.next_power_of_2(half), "HEADS": _HEADS}
        _rotate[grid](heads, cos, sin, result, *strides, num_heads, **sizes)
    return result


@triton.jit
def _rotate(
    heads: tl.tensor,
    cosines: tl.tensor,
    sines: tl.tensor,
    result: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    num_heads: tl.tensor,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    of_token = column < HALF
    inside = (head < num_heads) & of_token
    cos = tl.load(cosines + token * HALF + column, mask=of_token)
    sin = tl.load(sines + token * HALF + column, mask=of_token)
    source = heads + token * token_stride + head * head_stride + column
    first = tl.load(source, mask=inside).to(tl.float32)
    second = tl.load(source + HALF, mask=inside).to(tl.float32)
    target = result + (token * num_heads + head) * 2 * HALF + column
    tl.store(target, first * cos - second * sin, mask=inside)
    tl.store(target + HALF, second * cos + first * sin, mask=inside)
