"""Shared-prefix attention equals separate sequences and its dense twin, gradients included."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_longpo.attention.dense import dense_attention
from megatron_longpo.attention.kernels import CpuFlashKernel
from megatron_longpo.attention.shared_prefix import backward_tiles, forward_tiles, shared_prefix_attention
from megatron_longpo.attention.tiles import plan
from megatron_longpo.data.layout import DocumentLayout, RowLayout

HEADS, GROUPS, HEAD_DIM = 4, 2, 8
SCALE = 1 / math.sqrt(HEAD_DIM)

LAYOUTS = [
    pytest.param(RowLayout((DocumentLayout(37, (5, 9)),)), id="two branches"),
    pytest.param(RowLayout((DocumentLayout(1, (1,)),)), id="one token each"),
    pytest.param(RowLayout((DocumentLayout(23, ()),)), id="no branch"),
    pytest.param(RowLayout((DocumentLayout(19, (3, 1, 7, 2, 5, 4)),)), id="six branches"),
    pytest.param(
        RowLayout((DocumentLayout(21, (4, 6)), DocumentLayout(8, (3,)), DocumentLayout(5, ()))), id="documents"
    ),
    pytest.param(RowLayout((DocumentLayout(21, (3, 6)), DocumentLayout(7, (5, 1))), 2, 16), id="padding"),
    pytest.param(RowLayout((DocumentLayout(37, (5, 9)),), window_tokens=7), id="window between branches"),
    pytest.param(RowLayout((DocumentLayout(21, (9, 6)), DocumentLayout(4, (3,))), 2, 16, 3), id="shortest window"),
    pytest.param(RowLayout((DocumentLayout(37, (5, 9)),), window_tokens=42), id="window of the last tokens"),
]


def random_row(
    layout: RowLayout, dtype: torch.dtype = torch.float64, heads: int = HEADS, groups: int = GROUPS, seed: int = 0
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Leaves q, k, v of a row, and a gradient of the output that is large at padding too."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(layout.padded_tokens, n, HEAD_DIM) for n in (heads, groups, groups, heads)]
    *qkv, grad_out = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return [x.requires_grad_() for x in qkv], grad_out


def with_gradients(
    attention: Callable[..., torch.Tensor], qkv: Sequence[torch.Tensor], grad_out: torch.Tensor, *args: object
) -> list[torch.Tensor]:
    """Output and gradients of q, k and v."""
    out = attention(*qkv, *args)
    return [out.detach(), *torch.autograd.grad(out, qkv, grad_out)]


def separate_sequences(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: RowLayout) -> torch.Tensor:
    """Every branch as a sequence of its own, [prefix | branch], by dense causal attention; the prefix once alone."""
    out = torch.zeros_like(q)
    for segment in layout.segments:
        rows = list(range(segment.start, segment.stop))
        if segment.branch >= 0:
            rows = [*range(segment.prefix_start, segment.prefix_start + segment.prefix_tokens), *rows]
        expand = q.shape[1] // k.shape[1]
        keys, values = k[rows].repeat_interleave(expand, 1), v[rows].repeat_interleave(expand, 1)
        scores = torch.einsum("qnd,knd->nqk", q[rows], keys) * SCALE
        every = torch.ones(len(rows), len(rows), dtype=torch.bool)
        unseen = every.triu(1)
        if layout.window_tokens is not None:
            unseen = unseen | every.tril(-layout.window_tokens)
        sequence = torch.einsum("nqk,knd->qnd", scores.masked_fill(unseen, -torch.inf).softmax(-1), values)
        own = torch.arange(segment.start, segment.stop)
        out = out.index_copy(0, own, sequence[-segment.num_tokens :])
    return out


def assert_equal(actual: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    largest = max(b.abs().max() for b in expected)
    for name, a, b in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
        # A query that sees one key has no gradient: what rounding leaves of it depends on the CPU.
        error = (a - b).abs().max() / b.abs().max().clamp_min(largest / 100)
        assert error <= tolerance, f"{name} is off by {error:.1e} relative to its largest value"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_separate_sequences(layout: RowLayout, groups: int, dtype: torch.dtype, tolerance: float) -> None:
    qkv, grad_out = random_row(layout, dtype, groups=groups)
    actual = with_gradients(shared_prefix_attention, qkv, grad_out, layout, SCALE)
    assert_equal(actual, with_gradients(separate_sequences, qkv, grad_out, layout), tolerance)


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(
        st.builds(DocumentLayout, st.integers(1, 50), st.lists(st.integers(1, 17), max_size=6).map(tuple)),
        min_size=1,
        max_size=3,
    ),
    cp_size=st.sampled_from([1, 2, 4]),
    row_multiple=st.sampled_from([1, 16]),
    window_tokens=st.none() | st.integers(1, 70),
)
def test_equals_dense_twin(
    documents: list[DocumentLayout], cp_size: int, row_multiple: int, window_tokens: int | None
) -> None:
    layout = RowLayout(tuple(documents), cp_size, row_multiple, window_tokens)
    qkv, grad_out = random_row(layout)
    actual = with_gradients(shared_prefix_attention, qkv, grad_out, layout, SCALE)
    assert_equal(actual, with_gradients(dense_attention, qkv, grad_out, layout, SCALE), 1e-12)


@pytest.mark.parametrize("window_tokens", [None, 400])
def test_equals_dense_twin_beyond_a_kernel_block(window_tokens: int | None) -> None:
    """Blocks of the CPU kernel are up to 256 queries and 512 keys, and change size at 192 and 768 queries."""
    layout = RowLayout((DocumentLayout(1031, (300, 517)),), window_tokens=window_tokens)
    qkv, grad_out = random_row(layout)
    actual = with_gradients(shared_prefix_attention, qkv, grad_out, layout, SCALE)
    assert_equal(actual, with_gradients(dense_attention, qkv, grad_out, layout, SCALE), 1e-12)


def test_bf16_is_as_near_to_fp64_as_dense_bf16() -> None:
    layout = RowLayout((DocumentLayout(130, (30, 40)),))
    qkv, grad_out = random_row(layout)
    exact = with_gradients(dense_attention, qkv, grad_out, layout, SCALE)
    low = [x.detach().bfloat16().requires_grad_() for x in qkv]
    ours = with_gradients(shared_prefix_attention, low, grad_out.bfloat16(), layout, SCALE)
    assert all(x.dtype == torch.bfloat16 for x in ours)
    assert_equal([x.double() for x in ours], exact, 2e-2)


@pytest.mark.parametrize(("branches", "dtype"), [((3, 5), torch.float32), ((), torch.bfloat16)], ids=["added", "one"])
def test_key_gradients_of_several_tiles_add_up_in_fp32(branches: tuple[int, ...], dtype: torch.dtype) -> None:
    layout = RowLayout((DocumentLayout(9, branches),))
    qkv, grad_out = random_row(layout, torch.bfloat16)
    tiles, kernel = plan(layout), CpuFlashKernel()
    q, k, v = (x.detach() for x in qkv)
    out, lse = forward_tiles(q, k, v, tiles, SCALE, kernel)
    _, dk, dv = backward_tiles(grad_out, q, k, v, out, lse, tiles, SCALE, kernel)
    assert (dk.dtype, dv.dtype) == (dtype, dtype)


def test_large_scores_do_not_overflow() -> None:
    layout = RowLayout((DocumentLayout(30, (5, 6)),))
    (q, k, v), grad_out = random_row(layout)
    qkv = [(q * 60).detach().requires_grad_(), (k * 60).detach().requires_grad_(), v]
    actual = with_gradients(shared_prefix_attention, qkv, grad_out, layout, SCALE)
    assert_equal(actual, with_gradients(dense_attention, qkv, grad_out, layout, SCALE), 1e-11)


def test_gradcheck() -> None:
    layout = RowLayout((DocumentLayout(3, (2, 1)),), row_multiple=8)
    qkv, _ = random_row(layout, heads=2, groups=1)
    assert torch.autograd.gradcheck(lambda q, k, v: shared_prefix_attention(q, k, v, layout, SCALE), qkv)


def test_expanded_gradient() -> None:
    """The gradient of a sum has strides of 0, which the kernel has to notice."""
    layout = RowLayout((DocumentLayout(13, (4, 6)),))
    qkv, _ = random_row(layout)
    actual = torch.autograd.grad(shared_prefix_attention(*qkv, layout, SCALE).sum(), qkv)
    expected = torch.autograd.grad(dense_attention(*qkv, layout, SCALE).sum(), qkv)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_padding_is_zero_and_has_no_gradient() -> None:
    layout = RowLayout((DocumentLayout(9, (3, 5)),), cp_size=2, row_multiple=32)
    qkv, grad_out = random_row(layout)
    padding = torch.ones(layout.padded_tokens, dtype=torch.bool)
    for segment in layout.segments:
        padding[segment.start : segment.stop] = False
    assert padding.sum() > 4
    torch.use_deterministic_algorithms(True)  # memory that is not written is NaN
    try:
        out = shared_prefix_attention(*qkv, layout, SCALE)
        gradients = torch.autograd.grad(out, qkv, grad_out, retain_graph=True)
    finally:
        torch.use_deterministic_algorithms(False)
    *_, lse = out.grad_fn.saved_tensors
    for x in (out, *gradients, lse.t()):
        assert not x[padding].any()
        assert x[~padding].any()


def test_padding_may_hold_anything() -> None:
    layout = RowLayout((DocumentLayout(9, (3, 5)),), cp_size=2, row_multiple=32)
    qkv, grad_out = random_row(layout)
    clean = with_gradients(shared_prefix_attention, qkv, grad_out, layout, SCALE)
    for x in (*qkv, grad_out):
        for segment in layout.segments:
            x.data[segment.stop : segment.start + segment.padded_tokens] = torch.nan
    for a, b in zip(with_gradients(shared_prefix_attention, qkv, grad_out, layout, SCALE), clean, strict=True):
        assert torch.equal(a, b)


def test_views_of_a_fused_projection_are_not_kept_alive() -> None:
    layout = RowLayout((DocumentLayout(40, (5, 6)),))
    fused = torch.randn(layout.padded_tokens, GROUPS, HEADS // GROUPS + 2, HEAD_DIM, dtype=torch.float64)
    fused.requires_grad_()
    q, k, v = fused[:, :, :-2].flatten(1, 2), fused[:, :, -2], fused[:, :, -1]
    out = shared_prefix_attention(q, k, v, layout, SCALE)
    saved = out.grad_fn.saved_tensors
    assert max(x.untyped_storage().nbytes() for x in saved) == out.nbytes
    grad_out = torch.randn_like(out)
    (actual,) = torch.autograd.grad(out, fused, grad_out)
    (expected,) = torch.autograd.grad(dense_attention(q, k, v, layout, SCALE), fused, grad_out)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operator returns."""

    num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor):
                self.num_elements = max(self.num_elements, x.numel())
        return result


def test_no_score_matrix() -> None:
    layout = RowLayout((DocumentLayout(500, (60, 70)),), cp_size=2, row_multiple=64)
    qkv, grad_out = random_row(layout, torch.float32)
    with LargestTensor() as ours:
        with_gradients(shared_prefix_attention, qkv, grad_out, layout, SCALE)
    with LargestTensor() as dense:
        with_gradients(dense_attention, qkv, grad_out, layout, SCALE)
    assert ours.num_elements <= grad_out.numel()
    assert dense.num_elements >= layout.padded_tokens**2


def test_merging_by_autograd_is_wrong() -> None:
    """The tempting short cut: differentiate each part by itself and hold the weights of the merge constant."""
    kernel = CpuFlashKernel()

    class Part(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, causal):  # type: ignore[no-untyped-def]
            out, lse = kernel.forward(q, k, v, causal, SCALE)
            ctx.save_for_backward(q, k, v, out, lse)
            ctx.causal = causal
            ctx.mark_non_differentiable(lse)
            return out, lse

        @staticmethod
        def backward(ctx, grad_out, _):  # type: ignore[no-untyped-def]
            q, k, v, out, lse = ctx.saved_tensors
            return *kernel.backward(grad_out, q, k, v, out, lse, ctx.causal, SCALE), None

    layout = RowLayout((DocumentLayout(40, (12,)),))
    qkv, grad_out = random_row(layout)

    def merged_by_autograd(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        prefix, _ = Part.apply(q[:40], k[:40], v[:40], True)
        on_prefix, prefix_lse = Part.apply(q[40:], k[:40], v[:40], False)
        on_self, self_lse = Part.apply(q[40:], k[40:], v[40:], True)
        weight = torch.sigmoid(self_lse - prefix_lse).t().unsqueeze(-1)
        return torch.cat((prefix, on_prefix * (1 - weight) + on_self * weight))

    wrong = with_gradients(merged_by_autograd, qkv, grad_out)
    right = with_gradients(dense_attention, qkv, grad_out, layout, SCALE)
    out_error, dq_error, dk_error, dv_error = (
        ((a - b).norm() / b.norm()).item() for a, b in zip(wrong, right, strict=True)
    )
    assert out_error < 1e-12 and dv_error < 1e-12
    assert dq_error > 1e-2 and dk_error > 1e-2


def test_forward_alone_equals_forward_with_grad() -> None:
    layout = RowLayout((DocumentLayout(21, (4, 6)),))
    qkv, _ = random_row(layout)
    with torch.no_grad():
        out = shared_prefix_attention(*qkv, layout, SCALE)
    assert out.grad_fn is None
    assert torch.equal(out, shared_prefix_attention(*qkv, layout, SCALE))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((20, 4, 8), (21, 2, 8), (21, 2, 8)), "20 queries, 21 keys and 21 values for a layout of 21 tokens"),
        (((21, 4, 8), (21, 3, 8), (21, 3, 8)), "multiple"),
        (((21, 4, 8), (21, 2, 8), (21, 4, 8)), "one shape"),
    ],
)
def test_bad_shapes(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    layout = RowLayout((DocumentLayout(16, (2, 3)),))
    with pytest.raises(ValueError, match=message):
        shared_prefix_attention(*(torch.zeros(shape) for shape in shapes), layout, SCALE)
