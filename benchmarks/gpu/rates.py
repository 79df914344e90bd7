"""What the device reaches: matrix products, attention forward and backward, and how exact its kernels are."""

# T=tokens N=query heads G=key/value heads D=head_dim

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.settings import Settings
from megatron_longpo import platform
from megatron_longpo.attention.dense import dense_attention
from megatron_longpo.attention.shared_prefix import shared_prefix_attention
from megatron_longpo.data.layout import DocumentLayout, RowLayout
from megatron_longpo.model.flops import attended_pairs

_HEADS, _GROUPS, _HEAD_DIM = 32, 8, 128
_REPEATS = 15
ERROR_LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Relative errors of attention that rounding explains."""


def matmul_tflops(settings: Settings) -> float:
    """Rate of a large square product in the training dtype, TFLOP/s."""
    size = settings.matmul_size
    a, b = (torch.randn(size, size, device=platform.device(), dtype=_dtype()) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: a @ b) / 1e12


def attention_tflops(settings: Settings, backend: str) -> dict[str, float]:
    """Rates of shared-prefix attention with a 7B model's heads, TFLOP/s, counting attended pairs only."""
    layout = RowLayout((DocumentLayout(settings.attention_tokens, (512, 512)),))
    q, k, v = _row(layout, _dtype())
    flops = 4.0 * _HEADS * _HEAD_DIM * attended_pairs(layout)
    scale = 1 / math.sqrt(_HEAD_DIM)
    forward = _seconds(lambda: shared_prefix_attention(q, k, v, layout, scale, backend))
    out = shared_prefix_attention(q, k, v, layout, scale, backend)
    grad = torch.randn_like(out)
    backward = _seconds(lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True))
    # Model FLOPs: the backward's recomputed scores are not counted, as everywhere here.
    return {
        "forward": flops / forward / 1e12,
        "backward": 2 * flops / backward / 1e12,
        "both": 3 * flops / (forward + backward) / 1e12,
    }


def kernel_error(dtype: torch.dtype, backend: str) -> float:
    """Largest relative error of output and gradients against the dense twin in fp64.

    Raises:
        RuntimeError: It is beyond what the dtype explains.
    """
    # Long enough for whole blocks of cuDNN's, with a rest in every segment.
    layout = RowLayout((DocumentLayout(1030, (600, 250)),))
    exact = [x.detach().double().requires_grad_() for x in _row(layout, torch.float32)]
    scale = 1 / math.sqrt(_HEAD_DIM)
    q, k, v = exact
    expected_out = dense_attention(q, k, v, layout, scale)
    grad = torch.randn_like(expected_out)
    expected = [expected_out, *torch.autograd.grad(expected_out, exact, grad)]
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in exact)
    out = shared_prefix_attention(q, k, v, layout, scale, backend)
    actual = [out, *torch.autograd.grad(out, (q, k, v), grad.to(dtype))]
    worst = max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(actual, expected, strict=True))
    if not worst < ERROR_LIMITS[dtype]:
        raise RuntimeError(
            f"attention {backend} in {dtype} is off by {worst:.1e} from its dense twin; at most {ERROR_LIMITS[dtype]:g}"
        )
    return worst


def _row(layout: RowLayout, dtype: torch.dtype) -> list[torch.Tensor]:
    shapes = [(layout.padded_tokens, heads, _HEAD_DIM) for heads in (_HEADS, _GROUPS, _GROUPS)]
    return [torch.randn(s, device=platform.device(), dtype=dtype).requires_grad_() for s in shapes]


def _dtype() -> torch.dtype:
    return torch.bfloat16 if platform.has_cuda() else torch.float32


def _seconds(function: Callable[[], Any]) -> float:
    """The median time of a call, after one that does not count."""
    times = []
    for _ in range(1 + _REPEATS):
        platform.synchronize()
        began = time.perf_counter()
        function()
        platform.synchronize()
        times.append(time.perf_counter() - began)
    return sorted(times[1:])[_REPEATS // 2]
