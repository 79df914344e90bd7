"""What the LM head does with the logits of a chunk, reading them once."""

# c=predictions of a chunk V=vocabulary

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 4096


def logsumexp(logits: torch.Tensor) -> torch.Tensor:
    """``log Σ exp`` of every row, ``[c]`` of ``[c, V]``, fp32 on CUDA; -inf for a row of nothing else.

    The maximum and the sum go along together and are rescaled as the maximum grows (Milakov and Gimelshein, "Online
    normalizer calculation for softmax", arXiv 1805.02867).
    """
    assert logits.dtype == torch.float32 and logits.stride(1) == 1
    result = logits.new_empty(len(logits))
    if len(logits):
        _logsumexp[(len(logits),)](logits, result, logits.stride(0), WIDTH=logits.shape[1], BLOCK=_BLOCK, num_warps=8)
    return result


def softmax_error(
    logits: torch.Tensor, log_total: torch.Tensor, column: torch.Tensor, here: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """``softmax - onehot``, the negative gradient of the target's log-prob with respect to the logits.

    Args:
        logits: fp32 ``[c, V]`` on CUDA.
        log_total: fp32 ``[c]``, the log of the sum of exponentials over the whole vocabulary.
        column: int64 ``[c, 1]``, the target's.
        here: bool ``[c, 1]``, whether the target is among these columns at all.
        out: ``[c, V]`` of any floating dtype, contiguous; filled and returned.
    """
    assert logits.dtype == torch.float32 and logits.stride(1) == 1 and out.is_contiguous()
    rows, width = logits.shape
    if rows:
        target = torch.where(here, column, -1)
        grid = rows, triton.cdiv(width, _BLOCK)
        _error[grid](logits, log_total, target, out, logits.stride(0), WIDTH=width, BLOCK=_BLOCK, num_warps=8)
    return out


@triton.jit
def _logsumexp(
    logits: tl.tensor, result: tl.tensor, row_stride: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    lowest = -3.4028234663852886e38  # a rank that holds padding only must not compute -inf - -inf
    largest = tl.full([BLOCK], lowest, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + row * row_stride + column, mask=column < WIDTH, other=-float("inf"))
        larger = tl.maximum(largest, x)
        total = total * tl.exp(largest - larger) + tl.exp(x - larger)
        largest = larger
    # Every lane has its own maximum until here.
    top = tl.max(largest, 0)
    total_of_all = tl.sum(total * tl.exp(largest - top), 0)
    tl.store(result + row, tl.log(total_of_all) + top)


@triton.jit
def _error(
    logits: tl.tensor,
    log_total: tl.tensor,
    target: tl.tensor,
    out: tl.tensor,
    row_stride: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    x = tl.load(logits + row * row_stride + column, mask=inside)
    probability = tl.exp(x - tl.load(log_total + row))
    error = tl.where(column == tl.load(target + row), probability - 1, probability)
    tl.store(out + row * WIDTH + column, error, mask=inside)
