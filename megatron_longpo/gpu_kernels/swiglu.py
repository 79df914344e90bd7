"""``silu(gate) * up`` and its gradient, one kernel each."""

# T=tokens F=ffn_hidden_size

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024
"""Columns of a program: 8 numbers a thread, 16 bytes in half precision."""


def swiglu(gate_and_up: torch.Tensor) -> torch.Tensor:
    """``[…, 2F]`` to ``[…, F]``, computed in fp32 and rounded once. No collectives.

    Args:
        gate_and_up: fp32, bf16 or fp16 on CUDA, contiguous in its last dimension.
    """
    assert gate_and_up.stride(-1) == 1
    rows = gate_and_up.flatten(0, -2)
    width = rows.shape[1] // 2
    result = rows.new_empty(rows.shape[0], width)
    if result.numel():
        _forward[_grid(result)](rows, result, rows.stride(0), width, BLOCK=_BLOCK)
    return result.view(*gate_and_up.shape[:-1], width)


def swiglu_gradient(grad: torch.Tensor, gate_and_up: torch.Tensor) -> torch.Tensor:
    """The gradient ``[…, 2F]`` of `swiglu`'s input, from that of its output ``[…, F]``."""
    rows, grad_rows = gate_and_up.flatten(0, -2), grad.flatten(0, -2)
    if grad_rows.stride(-1) != 1:
        grad_rows = grad_rows.contiguous()
    result = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    if result.numel():
        strides = grad_rows.stride(0), rows.stride(0)
        _backward[_grid(grad_rows)](grad_rows, rows, result, *strides, grad_rows.shape[1], BLOCK=_BLOCK)
    return result.view(gate_and_up.shape)


def _grid(rows: torch.Tensor) -> tuple[int, int]:
    return rows.shape[0], triton.cdiv(rows.shape[1], _BLOCK)


@triton.jit
def _forward(rows: tl.tensor, result: tl.tensor, row_stride: tl.tensor, width: tl.tensor, BLOCK: tl.constexpr) -> None:
    # Rows of half a million tokens have more numbers than 32 bits count.
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(rows + row * row_stride + column, mask=inside).to(tl.float32)
    up = tl.load(rows + row * row_stride + width + column, mask=inside).to(tl.float32)
    tl.store(result + row * width + column, gate * tl.sigmoid(gate) * up, mask=inside)


@triton.jit
def _backward(
    grads: tl.tensor,
    rows: tl.tensor,
    result: tl.tensor,
    grad_stride: tl.tensor,
    row_stride: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    grad = tl.load(grads + row * grad_stride + column, mask=inside).to(tl.float32)
    gate = tl.load(rows + row * row_stride + column, mask=inside).to(tl.float32)
    up = tl.load(rows + row * row_stride + width + column, mask=inside).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    into = result + row * 2 * width + column
    tl.store(into, grad * up * sigmoid * (1 + gate * (1 - sigmoid)), mask=inside)
    tl.store(into + width, grad * gate * sigmoid, mask=inside)
