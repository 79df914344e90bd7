"""The CUDA kernels' calls, answered on a CPU: what they hand to torch's operators and make of the results.

The operators' schemas are torch's own. Behind them stand plain formulas in fp64 that keep to what the CUDA code asks of
its arguments and leaves out (aten/src/ATen/native/transformers/cuda: flash_attn/flash_api.cpp, attention_backward.cu;
aten/src/ATen/native/cudnn/MHA.cpp).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_longpo.attention.blocks import are_blocks
from megatron_longpo.attention.cudnn import CudnnKernel
from megatron_longpo.attention.dense import dense_attention
from megatron_longpo.attention.grouped import FoldedRectangles
from megatron_longpo.attention.kernels import AttentionKernel, CudaEfficientKernel, CudaFlashKernel
from megatron_longpo.attention.shared_prefix import backward_tiles, forward_tiles
from megatron_longpo.attention.tiles import plan
from megatron_longpo.data.layout import DocumentLayout, RowLayout

KERNELS = [CudaFlashKernel(), CudaEfficientKernel(), CudnnKernel(16, 32)]
OVERFLOWING = -88.7
"""Log-sum-exps below it have an infinite exp(-lse) in fp32."""


calls: Counter[str] = Counter()


def attend(q: torch.Tensor, k: torch.Tensor, causal: bool, scale: float, bottom_right: bool) -> torch.Tensor:
    """Scores ``[B, N, Tq, Tk]`` of heads-first queries and keys."""
    scores = scale * q @ k.transpose(-1, -2)
    num_queries, num_keys = scores.shape[-2:]
    seen = torch.ones(num_queries, num_keys, dtype=torch.bool)
    if causal:
        seen = seen.tril(num_keys - num_queries if bottom_right else 0)
    return scores.masked_fill(~seen, -math.inf)


def gradients(grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, scores: torch.Tensor, scale: float) -> Any:
    """Of heads-first queries, keys and values, from weights ``exp(score - lse)``."""
    weights = (scores - lse[..., None]).exp()
    grad_scores = weights * (grad @ v.transpose(-1, -2) - (grad * out).sum(-1, keepdim=True))
    return scale * grad_scores @ k, scale * grad_scores.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ grad


def swapped(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Heads and tokens change places."""
    return [x.transpose(1, 2) for x in tensors]


def repeated(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(like.shape[1] // x.shape[1], 1)


def flash_forward(q: Any, k: Any, v: Any, cum_q: Any, cum_k: Any, max_q: int, max_k: int, *rest: Any, **kw: Any) -> Any:
    dropout, causal, debug = rest
    assert cum_q is None and cum_k is None and not debug and dropout == 0.0
    assert (max_q, max_k) == (q.shape[1], k.shape[1]) and q.shape[3] % 8 == 0
    assert all(x.stride(-1) == 1 and x.storage_offset() % 8 == 0 and x.stride(-2) % 8 == 0 for x in (q, k, v))
    q_, k_, v_ = swapped(q, k, v)
    scores = attend(q_, repeated(k_, q_), causal, kw["scale"], bottom_right=True)
    out = (scores.softmax(-1) @ repeated(v_, q_)).transpose(1, 2)
    random_state = torch.empty(2, dtype=torch.uint64)
    return out, scores.logsumexp(-1), random_state, torch.empty((), dtype=torch.uint64), torch.empty(0)


def flash_backward(
    grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, cum_q: Any, cum_k: Any, max_q: int, max_k: int, *rest: Any,
    **kw: Any,
) -> Any:  # fmt: skip
    dropout, causal, random_state, _ = rest
    assert cum_q is None and cum_k is None and dropout == 0.0 and random_state.dtype == torch.uint64
    assert (max_q, max_k) == (q.shape[1], k.shape[1]) and grad.shape == out.shape == q.shape
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    # The kernel gets an address and takes [B, N, Tq] to lie there.
    lse = lse.as_strided((1, q.shape[2], q.shape[1]), (0, q.shape[1], 1))
    grad_, q_, k_, v_, out_ = swapped(grad, q, k, v, out)
    scores = attend(q_, repeated(k_, q_), causal, kw["scale"], bottom_right=True)
    dq, dk, dv = gradients(grad_, q_, repeated(k_, q_), repeated(v_, q_), out_, lse, scores, kw["scale"])
    dk, dv = (x.unflatten(1, (k.shape[2], -1)).sum(2) for x in (dk, dv))
    return tuple(swapped(dq, dk, dv))


# Arguments that have their defaults do not arrive here.
def efficient_forward(
    q: Any, k: Any, v: Any, bias: Any, with_lse: bool, dropout: float = 0.0, causal: bool = False, **kw: Any
) -> Any:
    assert bias is None and with_lse and dropout == 0.0 and q.shape[1] == k.shape[1] == v.shape[1]
    scores = attend(q, k, causal, kw["scale"], bottom_right=False)
    padding = (0, -q.shape[2] % 32)
    lse = torch.nn.functional.pad(scores.logsumexp(-1), padding, value=math.inf)
    out = (scores.softmax(-1) @ v).transpose(1, 2).contiguous().transpose(1, 2)
    return out, lse, torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64)


def efficient_backward(grad: Any, q: Any, k: Any, v: Any, bias: Any, out: Any, lse: Any, *rest: Any, **kw: Any) -> Any:
    seed, offset, dropout, mask, *causal = rest
    assert bias is None and dropout == 0.0 and mask == [True, True, True, False]
    assert q.shape[1] == k.shape[1] == v.shape[1] and seed.dtype == offset.dtype == torch.int64
    # The output's row stride is not asked for, and log-sum-exps are read in aligned blocks of 32.
    out = out.as_strided(out.shape, (0, out.shape[3], out.shape[1] * out.shape[3], 1))
    assert lse.shape[2] % 32 == 0 and lse.stride(1) == lse.shape[2] and (lse[..., q.shape[2] :] == math.inf).all()
    scores = attend(q, k, causal == [True], kw["scale"], bottom_right=False)
    results = gradients(grad, q, k, v, out, lse[..., : q.shape[2]], scores, kw["scale"])
    return *results, torch.empty(0)


def cudnn_forward(
    q: Any, k: Any, v: Any, bias: Any, with_lse: bool, dropout: float = 0.0, causal: bool = False, *rest: Any, **kw: Any
) -> Any:
    assert bias is None and with_lse and dropout == 0.0 and rest in ((), (False,))
    assert are_blocks(q.shape[2], k.shape[2], 16, 32)
    calls["cuDNN"] += 1
    assert all(x.stride(-1) == 1 and x.stride(-2) % 8 == 0 for x in (q, k, v)) and q.shape[3] % 8 == 0
    scores = attend(q, repeated(k, q), causal, kw["scale"], bottom_right=False)
    out = (scores.softmax(-1) @ repeated(v, q)).transpose(1, 2).contiguous().transpose(1, 2)
    none, seed = torch.empty(0), torch.zeros((), dtype=torch.int64)
    return out, scores.logsumexp(-1)[..., None], none, none, q.shape[2], k.shape[2], seed, seed, none


def cudnn_backward(
    grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, seed: Any, offset: Any, bias: Any, *rest: Any, **kw: Any
) -> Any:
    cum_q, cum_k, max_q, max_k, dropout, causal = rest
    assert bias is None and cum_q is None and cum_k is None and dropout == 0.0
    assert seed.dtype == offset.dtype == torch.int64 and (max_q, max_k) == (q.shape[2], k.shape[2])
    assert all(x.stride(-1) == 1 for x in (grad, q, k, v, out)) and grad.shape == out.shape == q.shape
    # The shape of the forward pass's own, whose strides the plan is built for.
    assert lse.shape == (*q.shape[:3], 1) and lse.is_contiguous()
    scores = attend(q, repeated(k, q), causal, kw["scale"], bottom_right=False)
    dq, dk, dv = gradients(grad, q, repeated(k, q), repeated(v, q), out, lse[..., 0], scores, kw["scale"])
    assert are_blocks(q.shape[2], k.shape[2], 16, 32)
    calls["cuDNN backward"] += 1
    # A fault that `cudnn` names.
    if not causal and k.shape[2] % 128 == 64:
        dq = dq.masked_fill(lse < OVERFLOWING, math.nan)
    return dq, *(x.unflatten(1, (k.shape[1], -1)).sum(2) for x in (dk, dv))


@pytest.fixture(scope="module", autouse=True)
def operators() -> Iterator[None]:
    library = torch.library.Library("aten", "IMPL")
    for name, function in (
        ("_flash_attention_forward", flash_forward),
        ("_flash_attention_backward", flash_backward),
        ("_scaled_dot_product_efficient_attention", efficient_forward),
        ("_scaled_dot_product_efficient_attention_backward", efficient_backward),
        ("_scaled_dot_product_cudnn_attention", cudnn_forward),
        ("_scaled_dot_product_cudnn_attention_backward", cudnn_backward),
    ):
        library.impl(name, function, "CPU")
    yield
    library._destroy()


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(RowLayout((DocumentLayout(77, (15, 30)),)), id="two branches"),
        pytest.param(RowLayout((DocumentLayout(33, (1, 2, 3)), DocumentLayout(64, (32,)))), id="documents"),
        pytest.param(RowLayout((DocumentLayout(50, (7, 11)),), cp_size=4, row_multiple=64), id="padding"),
        pytest.param(RowLayout((DocumentLayout(90, (21, 40)),), window_tokens=37), id="window"),
    ],
)
@pytest.mark.parametrize("kernel", KERNELS, ids=["flash", "efficient", "cuDNN"])
@pytest.mark.parametrize("folded", [False, True], ids=["plain", "folded"])
@pytest.mark.parametrize(("heads", "groups"), [(8, 2), (4, 4)])
def test_equals_dense_twin(layout: RowLayout, kernel: AttentionKernel, folded: bool, heads: int, groups: int) -> None:
    *qkv, grad_out = random_row(layout, heads, groups)
    calls.clear()
    check(layout, kernel, folded, qkv, grad_out, 0.3)
    assert (calls["cuDNN"] == calls["cuDNN backward"] > 0) == isinstance(kernel, CudnnKernel)


@pytest.mark.parametrize(
    "layout",
    [
        # Branches see 64 keys more than a multiple of 128.
        pytest.param(RowLayout((DocumentLayout(64, (33,)), DocumentLayout(448, (1, 260)))), id="keys"),
        pytest.param(RowLayout((DocumentLayout(128, (1, 1)), DocumentLayout(1, (130, 3)))), id="single"),
    ],
)
@pytest.mark.parametrize(
    "kernel", [CudaFlashKernel(), CudaEfficientKernel(), CudnnKernel(128, 128)], ids=["flash", "efficient", "cuDNN"]
)
@pytest.mark.parametrize("folded", [False, True], ids=["plain", "folded"])
def test_queries_that_see_only_very_negative_scores(layout: RowLayout, kernel: AttentionKernel, folded: bool) -> None:
    q, k, v, grad_out = random_row(layout, 8, 2)
    with torch.no_grad():
        q[..., 0], k[..., 0] = 1.0, -400.0
    lse = check(layout, kernel, folded, [q, k, v], grad_out, 0.3)
    assert (lse < OVERFLOWING).all()


def random_row(layout: RowLayout, heads: int, groups: int) -> list[torch.Tensor]:
    """Leaves q, k and v, and a gradient of the output, in fp64."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(layout.padded_tokens, n, 16) for n in (heads, groups, groups, heads)]
    *qkv, grad_out = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [*(x.requires_grad_() for x in qkv), grad_out]


def check(
    layout: RowLayout,
    kernel: AttentionKernel,
    folded: bool,
    qkv: list[torch.Tensor],
    grad_out: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Output and gradients equal the dense twin's; returns the log-sum-exps."""
    heads, groups = qkv[0].shape[1], qkv[1].shape[1]
    exact = dense_attention(*qkv, layout, scale)
    expected = [exact, *torch.autograd.grad(exact, qkv, grad_out)]
    kernel = FoldedRectangles(kernel) if folded else kernel
    # Views of a fused projection, as Megatron's layers make them.
    fused = torch.cat([x.detach() for x in qkv], 1)
    q, k, v = fused.split([heads, groups, groups], 1)
    with torch.no_grad():
        out, lse = forward_tiles(q, k, v, plan(layout), scale, kernel)
        actual = [out, *backward_tiles(grad_out, q, k, v, out, lse, plan(layout), scale, kernel)]
    for name, a, b in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
    return lse


def test_flash_refuses_heads_that_its_kernels_do_not_have() -> None:
    q = torch.zeros(4, 2, 12)
    with pytest.raises(ValueError, match=r"--kv-channels 12: attention on CUDA needs a multiple of 8"):
        CudaFlashKernel().forward(q, q, q, True, 1.0)


@pytest.mark.parametrize("kernel", KERNELS, ids=["flash", "efficient", "cuDNN"])
def test_some_heads_of_wider_tensors_give_what_they_give_alone(kernel: AttentionKernel) -> None:
    """As context parallelism calls them, which gathers keys and values a few heads at a time."""
    q, k, v, grad = (torch.randn(19, 6, 16, dtype=torch.float64)[:, 2:4] for _ in range(4))
    wide_out, wide_lse = torch.zeros(19, 6, 16, dtype=torch.float64), torch.zeros(6, 19, dtype=torch.float64)
    out, lse = kernel.forward(q, k, v, True, 0.3)
    wide_out[:, 2:4], wide_lse[2:4] = out, lse
    alone = kernel.backward(*(x.contiguous() for x in (grad, q, k, v, out, lse)), True, 0.3)
    among = kernel.backward(grad, q, k, v, wide_out[:, 2:4], wide_lse[2:4], True, 0.3)
    for a, b in zip(among, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
