"""The chunked LM head against its dense twin: values, gradients, memory, and the corners of its arguments."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_longpo.objective import logprobs
from megatron_longpo.objective.dense import linear_logprobs_reference
from megatron_longpo.objective.logprobs import linear_logprobs
from tests.objective.lm_head import HeadInputs, head_inputs

VOCAB = 37
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=ON_GPU)]


def logps_and_gradients(function: Any, inputs: HeadInputs, **options: Any) -> tuple[torch.Tensor, ...]:
    inputs = inputs.leaves()
    logps = function(*inputs.arguments(), **options)
    logps.backward(inputs.grad_logps)
    assert inputs.hidden.grad is not None and inputs.weight.grad is not None
    return logps.detach(), inputs.hidden.grad, inputs.weight.grad


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 53, 1000])
def test_equals_the_dense_twin(chunk_tokens: int, dtype: torch.dtype, tolerance: float, device: str) -> None:
    inputs = head_inputs(dtype=dtype).to(device)
    ours = logps_and_gradients(linear_logprobs, inputs, vocab_size=VOCAB, chunk_tokens=chunk_tokens)
    dense = logps_and_gradients(linear_logprobs_reference, inputs, vocab_size=VOCAB)
    for name, a, b in zip(("logps", "grad_hidden", "grad_weight"), ours, dense, strict=True):
        assert a.dtype == b.dtype == dtype
        assert relative_difference(a, b) < tolerance, name
    assert not ours[2][VOCAB:].any(), "padding rows of the vocabulary have a gradient"


@settings(max_examples=40, deadline=None)
@given(
    num_predictions=st.integers(0, 30),
    row_tokens=st.integers(1, 20),
    vocab_size=st.integers(1, 12),
    padding=st.integers(0, 5),
    chunk_tokens=st.integers(1, 40),
    seed=st.integers(0, 2**16),
)
def test_equals_the_dense_twin_for_any_shape(
    num_predictions: int, row_tokens: int, vocab_size: int, padding: int, chunk_tokens: int, seed: int
) -> None:
    inputs = head_inputs(
        num_predictions,
        row_tokens=row_tokens,
        hidden_size=3,
        vocab_rows=vocab_size + padding,
        vocab_size=vocab_size,
        seed=seed,
    )
    ours = logps_and_gradients(linear_logprobs, inputs, vocab_size=vocab_size, chunk_tokens=chunk_tokens)
    dense = logps_and_gradients(linear_logprobs_reference, inputs, vocab_size=vocab_size)
    for a, b in zip(ours, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradcheck() -> None:
    inputs = head_inputs(6, row_tokens=4, hidden_size=3, vocab_rows=6, vocab_size=5).leaves()

    def function(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return linear_logprobs(
            hidden, weight, inputs.source_index, inputs.targets % 5, vocab_size=5, chunk_tokens=4, tp_group=None
        )

    assert torch.autograd.gradcheck(function, (inputs.hidden, inputs.weight))


@pytest.fixture
def cuda_products(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give the CPU the products that only CUDA has, half precision into fp32, so that their code path runs here."""
    library = torch.library.Library("aten", "IMPL")

    def into(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype, *, out: torch.Tensor | None = None) -> torch.Tensor:
        assert a.dtype == b.dtype and dtype == torch.float32
        product = a.float() @ b.float()
        return product if out is None else out.copy_(product)

    library.impl("mm.dtype", into, "CPU")
    library.impl("mm.dtype_out", into, "CPU")
    monkeypatch.setattr(logprobs, "_operand", lambda weight: weight)
    yield
    library._destroy()


def check_half_precision(dtype: torch.dtype, device: str) -> None:
    inputs = head_inputs(300, row_tokens=257, hidden_size=64, vocab_rows=520, vocab_size=511, dtype=dtype).to(device)
    ours = logps_and_gradients(linear_logprobs, inputs, vocab_size=511, chunk_tokens=64)
    exact_inputs = HeadInputs(inputs.hidden.float(), inputs.weight.float(), *list(vars(inputs).values())[2:])
    exact = logps_and_gradients(linear_logprobs_reference, exact_inputs, vocab_size=511)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == ours[2].dtype == dtype
    assert relative_difference(ours[0], exact[0]) < 1e-5, "logits must not be rounded to half precision"
    rounding = torch.finfo(dtype).eps
    assert relative_difference(ours[1].float(), exact[1]) < 2 * rounding
    assert relative_difference(ours[2].float(), exact[2]) < 2 * rounding


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_give_fp32_logps(dtype: torch.dtype, device: str) -> None:
    check_half_precision(dtype, device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_products_of_cuda(dtype: torch.dtype, cuda_products: None) -> None:
    check_half_precision(dtype, "cpu")


def test_fp32_states_and_bf16_weights() -> None:
    """With fp32 residuals the states are wider than the weight; each gradient has the dtype of its own tensor."""
    inputs = head_inputs(dtype=torch.bfloat16)
    narrow = logps_and_gradients(linear_logprobs, inputs, vocab_size=VOCAB, chunk_tokens=8)
    wide_states = HeadInputs(inputs.hidden.float(), *list(vars(inputs).values())[1:])
    wide = logps_and_gradients(linear_logprobs, wide_states, vocab_size=VOCAB, chunk_tokens=8)
    assert torch.equal(wide[0], narrow[0]) and torch.equal(wide[2], narrow[2])
    assert wide[1].dtype == torch.float32 and relative_difference(narrow[1].float(), wide[1]) < 0.01


def test_the_gradient_of_the_weight_is_summed_in_fp32() -> None:
    """1024 equal terms, added up one chunk at a time: a bf16 sum would stop growing long before that."""
    hidden, weight = torch.ones(1, 1).bfloat16(), torch.zeros(2, 1).bfloat16().requires_grad_()
    zeros = torch.zeros(1024, dtype=torch.int64)
    linear_logprobs(hidden, weight, zeros, zeros, vocab_size=2, chunk_tokens=1).sum().backward()
    assert weight.grad is not None and weight.grad[:, 0].tolist() == [512.0, -512.0]


def test_no_predictions_give_zero_gradients() -> None:
    logps, grad_hidden, grad_weight = logps_and_gradients(
        linear_logprobs, head_inputs(0), vocab_size=VOCAB, chunk_tokens=8
    )
    assert logps.shape == (0,) and not grad_hidden.any() and not grad_weight.any()


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_huge_logits_stay_finite(scale: float) -> None:
    inputs = head_inputs(dtype=torch.float32)
    inputs = HeadInputs(inputs.hidden * scale, *list(vars(inputs).values())[1:])
    for value in logps_and_gradients(linear_logprobs, inputs, vocab_size=VOCAB, chunk_tokens=8):
        assert torch.isfinite(value).all()


@pytest.mark.parametrize("target", [-1, VOCAB, 39, 40, 10**6])
def test_a_token_outside_of_the_vocabulary_has_probability_zero(target: int) -> None:
    inputs = head_inputs()
    inputs.targets[5] = target
    logps = linear_logprobs(*inputs.arguments(), vocab_size=VOCAB, chunk_tokens=8)
    assert logps[5] == -torch.inf and torch.isfinite(logps).sum() == len(logps) - 1


def test_gradients_only_of_what_requires_them() -> None:
    inputs = head_inputs()
    frozen_weight, frozen_hidden = inputs.leaves(), inputs.leaves()
    frozen_weight.weight.requires_grad_(False)
    frozen_hidden.hidden.requires_grad_(False)
    both = logps_and_gradients(linear_logprobs, inputs, vocab_size=VOCAB)
    with LargestTensor() as allocated:
        linear_logprobs(*frozen_weight.arguments(), vocab_size=VOCAB, chunk_tokens=1).backward(inputs.grad_logps)
    assert frozen_weight.hidden.grad is not None and torch.allclose(frozen_weight.hidden.grad, both[1])
    assert allocated.largest < inputs.hidden.numel() + 1, "a frozen weight still got a gradient"
    linear_logprobs(*frozen_hidden.arguments(), vocab_size=VOCAB).backward(inputs.grad_logps)
    assert frozen_hidden.weight.grad is not None and torch.equal(frozen_hidden.weight.grad, both[2])
    with torch.no_grad():
        assert not linear_logprobs(*inputs.leaves().arguments(), vocab_size=VOCAB).requires_grad


class LargestTensor(TorchDispatchMode):
    """Counts the elements of the largest tensor that an operation returned in new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        before = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in before:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def test_forward_allocates_one_chunk_and_never_a_copy_of_the_row() -> None:
    inputs = head_inputs(512, row_tokens=512, hidden_size=64, vocab_rows=48, vocab_size=48)
    with LargestTensor() as allocated, torch.no_grad():
        linear_logprobs(*inputs.arguments(), vocab_size=48, chunk_tokens=16)
    assert allocated.largest <= max(16 * 64, 16 * 48, 2 * 512)


PEAK_MEMORY = """
import resource, sys, torch
from megatron_longpo.objective.logprobs import linear_logprobs
torch.set_num_threads(1)
tokens, vocab, hidden_size = 16384, 32768, 16
hidden = torch.randn(tokens, hidden_size, requires_grad=True)
weight = torch.randn(vocab, hidden_size, requires_grad=True)
targets = torch.randint(vocab, (tokens,))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
linear_logprobs(hidden, weight, torch.arange(tokens), targets, vocab_size=vocab).mean().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)
"""


def test_peak_memory_of_16k_tokens_by_32k_vocabulary() -> None:
    """Their logits alone would take 2 GB."""
    result = subprocess.run([sys.executable, "-c", PEAK_MEMORY], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 0.5, f"{result.stdout} GiB above the weights"
