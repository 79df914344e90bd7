"""The Triton kernels against formulas in fp64: on the GPU, or, where Triton is but no GPU, in its interpreter."""

from __future__ import annotations

import importlib.util
import os
import sys

import pytest
import torch

from megatron_longpo.gpu_kernels import has_kernels

ON_GPU = torch.cuda.is_available()
if importlib.util.find_spec("triton") is None:
    pytest.skip("could not import 'triton'", allow_module_level=True)
if not ON_GPU:
    if "triton" in sys.modules:
        pytest.skip("Triton was imported without its interpreter: run this file alone", allow_module_level=True)
    os.environ["TRITON_INTERPRET"] = "1"

from megatron_longpo.gpu_kernels.rotation import rotated  # noqa: E402
from megatron_longpo.gpu_kernels.softmax import logsumexp, softmax_error  # noqa: E402
from megatron_longpo.gpu_kernels.swiglu import swiglu, swiglu_gradient  # noqa: E402

# Where there is no GPU, they run in the interpreter, unasked.
pytestmark = [pytest.mark.gpu] if ON_GPU else []
DEVICE = "cuda" if ON_GPU else "cpu"
# The interpreter cuts bf16 off instead of rounding.
DTYPES = [(torch.float32, 2e-6), (torch.bfloat16, 4e-3 if ON_GPU else 8e-3), (torch.float16, 5e-4)]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("shape", [(5, 1, 2 * 40), (3, 2 * 1500), (1, 2), (0, 8)])
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    x = (3 * torch.randn(shape, device=DEVICE)).to(dtype)
    exact = x.double().requires_grad_()
    gate, up = exact.chunk(2, dim=-1)
    expected = torch.nn.functional.silu(gate) * up
    grad = torch.randn(expected.shape, device=DEVICE).to(dtype)
    (expected_grad,) = torch.autograd.grad(expected, exact, grad.double())
    actual, actual_grad = swiglu(x), swiglu_gradient(grad, x)
    assert actual.shape == expected.shape and actual_grad.shape == x.shape
    assert actual.dtype == actual_grad.dtype == dtype
    if x.numel():
        assert relative_error(actual, expected.detach()) < tolerance
        assert relative_error(actual_grad, expected_grad) < tolerance


def test_swiglu_of_views() -> None:
    x = torch.randn(6, 20, device=DEVICE)[:, :16]
    grad = torch.randn(8, 6, device=DEVICE).t()
    torch.testing.assert_close(swiglu(x), swiglu(x.contiguous()))
    torch.testing.assert_close(swiglu_gradient(grad, x), swiglu_gradient(grad.contiguous(), x.contiguous()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "vocab", "padding"), [(3, 37, 0), (2, 9000, 5), (1, 4096, 1), (0, 5, 0)])
def test_softmax_of_logits(rows: int, vocab: int, padding: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = 10 * torch.randn(rows, vocab + padding, device=DEVICE)
    logits[:, vocab:] = -torch.inf
    expected = logits.double().logsumexp(1)
    total = logsumexp(logits)
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=1e-6)
    column = torch.randint(vocab, (rows, 1), device=DEVICE)
    here = torch.arange(rows, device=DEVICE)[:, None] != 1
    exact = logits.double().softmax(1).scatter_add_(1, column, -here.double())
    # A rank's shard is one part of the vocabulary, whose total is larger.
    actual = softmax_error(logits, total, column, here, torch.empty_like(logits, dtype=dtype))
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), exact, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
    if dtype == torch.float32:
        torch.testing.assert_close(softmax_error(logits, total, column, here, logits), actual)


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so(number: float) -> None:
    """A step is skipped by what it finds in the loss."""
    logits = torch.zeros(2, 5000, device=DEVICE)
    logits[1, 4500] = number
    assert logsumexp(logits).isfinite().tolist() == [True, False]


def test_a_row_of_padding_has_no_probability() -> None:
    logits = torch.full((2, 10), -torch.inf, device=DEVICE)
    assert torch.equal(logsumexp(logits), logits[:, 0])


def test_what_takes_kernels() -> None:
    assert has_kernels(torch.empty(0, device=DEVICE)) == ON_GPU
    assert not has_kernels(torch.empty(0, device=DEVICE, dtype=torch.float64))


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(("tokens", "heads", "width"), [(5, 12, 16), (3, 17, 6), (2, 1, 128), (0, 2, 4)])
def test_rotation(tokens: int, heads: int, width: int, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    # As Megatron cuts them out of the projection's output.
    x = torch.randn(tokens, 1, heads, 3 * width, device=DEVICE).to(dtype)[..., width : 2 * width]
    angles = 1e5 * torch.rand(tokens, 1, 1, width // 2, device=DEVICE)
    first, second = x.double().chunk(2, -1)
    cos, sin = angles.double().cos(), angles.double().sin()
    expected = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    actual = rotated(x, angles.cos(), angles.sin())
    assert actual.shape == x.shape and actual.is_contiguous() and actual.dtype == dtype
    if tokens:
        assert relative_error(actual, expected) < tolerance
        strided = x.transpose(0, 3).contiguous().transpose(0, 3)
        torch.testing.assert_close(rotated(strided, angles.cos(), angles.sin()), actual)
