"""Activations that wait in pinned host memory: the device holds less meanwhile, and gradients are the same bits."""

from __future__ import annotations

import pytest
import torch

from megatron_longpo import platform
from megatron_longpo.model.offload import OffloadChain

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

WIDTH, TOKENS, NUM_LAYERS = 1024, 8192, 8


def run(offloads: bool) -> tuple[list[torch.Tensor], int]:
    """Gradients of a stack of layers, and the bytes that the device holds between forward and backward pass."""
    torch.manual_seed(0)
    weights = [torch.randn(WIDTH, WIDTH, device="cuda", requires_grad=True) for _ in range(NUM_LAYERS)]
    x = torch.randn(TOKENS, WIDTH, device="cuda")
    before = torch.cuda.memory_allocated()
    chain = OffloadChain()
    for weight in weights:
        if offloads:
            with chain.next([weight]).saving():
                x = (x @ weight / WIDTH**0.5).tanh()
        else:
            x = (x @ weight / WIDTH**0.5).tanh()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated() - before
    x.square().mean().backward()
    return [weight.grad for weight in weights], held  # type: ignore[misc]


def test_gradients_are_equal_and_memory_is_not() -> None:
    expected, held = run(offloads=False)
    torch.cuda.reset_peak_memory_stats()
    actual, held_offloaded = run(offloads=True)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert held_offloaded < 0.4 * held, "more than what the last layer saved, which stays"
    # The host is ahead of the device, and no memory waits for it to see that a copy is done.
    peaks = torch.cuda.memory_stats()
    assert peaks["active_bytes.all.peak"] == peaks["allocated_bytes.all.peak"]


@pytest.mark.parametrize("shape", [(1,), (3, 2**20 + 1), (5, 7, 300_000)])
def test_a_copy_comes_back(shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape, device="cuda").bfloat16()
    for original in (tensor, tensor.transpose(0, -1)):
        expected = original.clone()
        copy = platform.HostCopy(original)
        assert torch.equal(copy.tensor(), expected)
