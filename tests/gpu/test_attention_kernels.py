"""Shared-prefix attention on a CUDA device equals its dense twin in fp64, in every dtype that has a kernel."""

import math

import pytest
import torch

from megatron_longpo.attention.cudnn import CudnnKernel
from megatron_longpo.attention.dense import dense_attention
from megatron_longpo.attention.grouped import FoldedRectangles
from megatron_longpo.attention.kernels import AttentionKernel, CudaEfficientKernel, CudaFlashKernel
from megatron_longpo.attention.shared_prefix import backward_tiles, forward_tiles, shared_prefix_attention
from megatron_longpo.attention.tiles import plan
from megatron_longpo.data.layout import DocumentLayout, RowLayout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LAYOUTS = [
    pytest.param(RowLayout((DocumentLayout(517, (65, 130)),)), id="two branches"),
    pytest.param(RowLayout((DocumentLayout(33, (1, 2, 3)), DocumentLayout(128, (64,)))), id="documents"),
    pytest.param(RowLayout((DocumentLayout(300, (31, 50)),), cp_size=4, row_multiple=64), id="padding"),
    pytest.param(RowLayout((DocumentLayout(2048, (900, 1000)),)), id="long branches"),
    pytest.param(RowLayout((DocumentLayout(517, (65, 130)),), window_tokens=100), id="window"),
    # cuDNN has its blocks here, and FlashAttention what is left of them.
    pytest.param(RowLayout((DocumentLayout(1500, (600, 700)),)), id="blocks"),
    pytest.param(RowLayout((DocumentLayout(2500, (300, 400)),), window_tokens=1100), id="blocks in a window"),
]
KERNELS = [
    pytest.param(CudaFlashKernel(), torch.bfloat16, 2e-2, id="flash bf16"),
    pytest.param(CudaFlashKernel(), torch.float16, 3e-3, id="flash fp16"),
    pytest.param(CudnnKernel(), torch.bfloat16, 2e-2, id="cuDNN bf16"),
    pytest.param(CudnnKernel(), torch.float16, 3e-3, id="cuDNN fp16"),
    pytest.param(CudaEfficientKernel(), torch.float32, 1e-5, id="efficient fp32"),
]


def random_row(layout: RowLayout, heads: int, groups: int, head_dim: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Leaves q, k, v and a gradient of the output, fp64 on the device."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(layout.padded_tokens, n, head_dim) for n in (heads, groups, groups, heads)]
    *qkv, grad_out = (torch.randn(shape, generator=generator, dtype=torch.float64).cuda() for shape in shapes)
    return [x.requires_grad_() for x in qkv], grad_out


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("kernel", "dtype", "tolerance"), KERNELS)
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize(("heads", "groups", "head_dim"), [(8, 2, 128), (4, 4, 64)])
def test_equals_dense_twin(
    layout: RowLayout,
    kernel: AttentionKernel,
    dtype: torch.dtype,
    tolerance: float,
    folded: bool,
    heads: int,
    groups: int,
    head_dim: int,
) -> None:
    scale = 1 / math.sqrt(head_dim)
    qkv, grad_out = random_row(layout, heads, groups, head_dim)
    exact = dense_attention(*qkv, layout, scale)
    expected = [exact, *torch.autograd.grad(exact, qkv, grad_out)]
    if folded:
        kernel = FoldedRectangles(kernel)
    q, k, v = (x.detach().to(dtype) for x in qkv)
    out, lse = forward_tiles(q, k, v, plan(layout), scale, kernel)
    actual = [out, *backward_tiles(grad_out.to(dtype), q, k, v, out, lse, plan(layout), scale, kernel)]
    for name, a, b in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
        error = ((a.double() - b).norm() / b.norm()).item()
        assert error < tolerance, f"{name} is off by {error:.1e}"


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(RowLayout((DocumentLayout(64, (33,)), DocumentLayout(1216, (700, 20)))), id="64 over a block"),
        pytest.param(RowLayout((DocumentLayout(128, (1, 1)), DocumentLayout(1, (70, 3)))), id="single"),
        pytest.param(RowLayout((DocumentLayout(1000, (2, 31)), DocumentLayout(96, (160, 5)))), id="others"),
        pytest.param(RowLayout((DocumentLayout(704, (65, 130)),), window_tokens=192), id="window"),
    ],
)
@pytest.mark.parametrize(("kernel", "dtype", "tolerance"), KERNELS)
@pytest.mark.parametrize("folded", [False, True])
def test_queries_that_see_only_very_negative_scores(
    layout: RowLayout, kernel: AttentionKernel, dtype: torch.dtype, tolerance: float, folded: bool
) -> None:
    """Their log-sum-exps are about -120: exp(-lse), the weight of a key that is not masked out, is infinite in fp32."""
    head_dim, scale = 64, 0.125
    qkv, grad_out = random_row(layout, 8, 2, head_dim)
    with torch.no_grad():
        qkv[0][..., 0], qkv[1][..., 0] = 1.0, -960.0
    qkv = [x.detach().to(dtype).double().requires_grad_() for x in qkv]
    exact = dense_attention(*qkv, layout, scale)
    expected = [exact, *torch.autograd.grad(exact, qkv, grad_out)]
    q, k, v = (x.detach().to(dtype) for x in qkv)
    kernel = FoldedRectangles(kernel) if folded else kernel
    out, lse = forward_tiles(q, k, v, plan(layout), scale, kernel)
    actual = [out, *backward_tiles(grad_out.to(dtype), q, k, v, out, lse, plan(layout), scale, kernel)]
    assert lse.max().item() < -88.7
    for name, a, b in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
        # Of the large component dq is a difference of equal numbers.
        a, b = (a[..., 1:], b[..., 1:]) if name == "dq" else (a, b)
        error = ((a.double() - b).norm() / b.norm()).item()
        assert error < max(tolerance, 1e-4), f"{name} is off by {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_autograd_function_on_views(dtype: torch.dtype) -> None:
    layout = RowLayout((DocumentLayout(200, (30, 40)),))
    fused = torch.randn(layout.padded_tokens, 2, 6, 64, device="cuda", dtype=dtype, requires_grad=True)
    q, k, v = fused[:, :, :-2].flatten(1, 2), fused[:, :, -2], fused[:, :, -1]
    out = shared_prefix_attention(q, k, v, layout, 0.125)
    grad_out = torch.randn_like(out)
    (actual,) = torch.autograd.grad(out, fused, grad_out)
    exact = dense_attention(q.double(), k.double(), v.double(), layout, 0.125)
    (expected,) = torch.autograd.grad(exact, fused, grad_out.double())
    assert ((actual - expected).norm() / expected.norm()).item() < (1e-5 if dtype == torch.float32 else 2e-2)


def test_no_score_matrix() -> None:
    layout = RowLayout((DocumentLayout(32768, (512, 512)),))
    q, k, v = (torch.randn(layout.padded_tokens, n, 64, device="cuda", dtype=torch.bfloat16) for n in (4, 1, 1))
    q.requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    shared_prefix_attention(q, k, v, layout, 0.125).sum().backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 0.1 * layout.padded_tokens**2 * 2
