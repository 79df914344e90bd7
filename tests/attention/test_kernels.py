"""Each kernel on its own: log-sum-exps, shapes, folding, and that the CUDA calls fit torch's operator schemas.

What the CUDA kernels compute is tested in tests/gpu; here they run on meta tensors, which check arguments and shapes.
"""

import math

import pytest
import torch

from megatron_longpo.attention import kernels
from megatron_longpo.attention.cudnn import CudnnKernel
from megatron_longpo.attention.grouped import FoldedRectangles
from megatron_longpo.attention.kernels import AttentionKernel, CpuFlashKernel, CudaEfficientKernel, CudaFlashKernel
from megatron_longpo.attention.selection import select_kernel
from megatron_longpo.config.training import FUSED

SCALE = 0.3


def tensors(
    num_queries: int, num_keys: int, heads: int, groups: int, head_dim: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[torch.Tensor, ...]:
    """q, k, v and grad_out, of which q, k and v are strided views of larger tensors."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(num_queries, heads), (num_keys, groups), (num_keys, groups), (num_queries, heads)]
    return tuple(
        torch.randn((tokens, n, head_dim + 8), generator=generator, dtype=torch.float64).to(device, dtype)[
            ..., :head_dim
        ]
        for tokens, n in shapes
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kernel", [CpuFlashKernel(), FoldedRectangles(CpuFlashKernel())])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_equals_softmax(kernel: AttentionKernel, causal: bool, groups: int) -> None:
    q, k, v, grad_out = tensors(23, 23 if causal else 31, 6, groups, 8, torch.float64)
    out, lse = kernel.forward(q, k, v, causal, SCALE)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    keys, values = (x.repeat_interleave(6 // groups, 1) for x in leaves[1:])
    scores = torch.einsum("qnd,knd->nqk", leaves[0], keys) * SCALE
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[1:], dtype=torch.bool).triu(1), -torch.inf)
    expected = torch.einsum("nqk,knd->qnd", scores.softmax(-1), values)
    torch.testing.assert_close(out, expected.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, scores.logsumexp(-1).detach(), rtol=0, atol=1e-12)
    actual = kernel.backward(grad_out, q, k, v, out, lse, causal, SCALE)
    for a, b in zip(actual, torch.autograd.grad(expected, leaves, grad_out), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_causal_mask_is_anchored_top_left() -> None:
    """Squares do not care; a rectangle must never be asked for causally, and this says what it would give."""
    q, k, v, _ = tensors(5, 9, 2, 2, 8, torch.float64)
    out, _ = CpuFlashKernel().forward(q, k, v, True, SCALE)
    torch.testing.assert_close(out[0], v[0])


@pytest.mark.parametrize(("dtype", "lse_dtype"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_dtypes(dtype: torch.dtype, lse_dtype: torch.dtype) -> None:
    q, k, v, grad_out = tensors(8, 8, 4, 2, 8, dtype)
    kernel = select_kernel(q.device, dtype)
    out, lse = kernel.forward(q, k, v, True, SCALE)
    assert out.dtype == dtype and lse.dtype == lse_dtype
    assert all(x.dtype == dtype for x in kernel.backward(grad_out, q, k, v, out, lse, True, SCALE))


class CountingKernel(CpuFlashKernel):
    """Notes the shape of the queries that reach it."""

    def __init__(self) -> None:
        self.queries: list[torch.Size] = []

    def forward(self, q, k, v, causal, scale):  # type: ignore[no-untyped-def]
        self.queries.append(q.shape)
        return super().forward(q, k, v, causal, scale)


def test_only_short_rectangles_of_grouped_heads_are_folded() -> None:
    inner = CountingKernel()
    kernel = FoldedRectangles(inner, below_queries=10)
    for num_queries, groups, causal in ((9, 2, False), (10, 2, False), (9, 4, False), (9, 2, True)):
        q, k, v, _ = tensors(num_queries, num_queries, 4, groups, 8, torch.float32)
        kernel.forward(q, k, v, causal, SCALE)
    assert inner.queries == [(18, 2, 8), (10, 4, 8), (9, 4, 8), (9, 4, 8)]


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [
        (CudaFlashKernel(), torch.bfloat16),
        (CudaFlashKernel(), torch.float16),
        (CudnnKernel(10, 10), torch.bfloat16),
        (CudnnKernel(10, 10), torch.float16),
        (CudaEfficientKernel(), torch.float32),
    ],
    ids=["flash bf16", "flash fp16", "cuDNN bf16", "cuDNN fp16", "efficient fp32"],
)
@pytest.mark.parametrize("causal", [True, False])
def test_cuda_calls_fit_the_operators(kernel: AttentionKernel, dtype: torch.dtype, folded: bool, causal: bool) -> None:
    q, k, v, grad_out = tensors(70, 70 if causal else 90, 8, 2, 32, dtype, "meta")
    if folded:
        kernel = FoldedRectangles(kernel)
    out, lse = kernel.forward(q, k, v, causal, SCALE)
    assert (out.shape, out.dtype) == (q.shape, dtype)
    assert (lse.shape, lse.dtype) == ((8, 70), torch.float32)
    row_lse = torch.empty(8, 200, device="meta")[:, 50:120]
    gradients = kernel.backward(grad_out, q, k, v, out, row_lse, causal, SCALE)
    assert [(x.shape, x.dtype) for x in gradients] == [(x.shape, dtype) for x in (q, k, v)]


def test_select_kernel() -> None:
    def selected(device: str, dtype: torch.dtype, *backend: str) -> type:
        kernel = select_kernel(torch.device(device), dtype, *backend)
        return type(kernel.kernel if isinstance(kernel, FoldedRectangles) else kernel)

    assert selected("cpu", torch.float32) is CpuFlashKernel
    assert selected("cuda", torch.bfloat16) is CudaFlashKernel
    assert selected("cuda", torch.bfloat16, FUSED) is CudnnKernel
    assert selected("cuda", torch.float32, FUSED) is CudaEfficientKernel
    with pytest.raises(ValueError, match=r"no attention kernel for torch.float64 on cuda.*--bf16"):
        selected("cuda", torch.float64)


@pytest.mark.parametrize("head_dim", [36, 264])
@pytest.mark.parametrize("kernel", [CudaFlashKernel(), CudnnKernel(), CudnnKernel(4, 4)])
def test_head_dim(kernel: AttentionKernel, head_dim: int) -> None:
    q, k, v, _ = tensors(4, 4, 2, 2, head_dim, torch.bfloat16, "meta")
    with pytest.raises(ValueError, match=f"--kv-channels {head_dim}"):
        kernel.forward(q, k, v, True, 1 / math.sqrt(head_dim))


def test_an_old_torch_refuses_what_it_would_count_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.empty(2**19 + 8, 32, 128, dtype=torch.bfloat16, device="meta")
    k, lse = q[:64, :8], torch.empty(32, len(q), device="meta")
    monkeypatch.setattr(kernels, "COUNTS_IN_INT32", True)
    with pytest.raises(
        ValueError, match=r"524296 tokens with 32 heads of 128 .* update torch to 2.11, or raise --tensor"
    ):
        CudaFlashKernel().backward(q, q, k, k, q, lse, False, SCALE)
    assert CudaFlashKernel().backward(q[:64], q[:64], k, k, q[:64], lse[:, :64], False, SCALE)[0].shape == (64, 32, 128)
