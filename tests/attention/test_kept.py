"""Attention under recomputation: kernels run once, gradients are equal, and nothing is left behind."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megatron_longpo.attention.kept import KeptResults
from megatron_longpo.attention.kernels import CpuFlashKernel
from megatron_longpo.attention.shared_prefix import shared_prefix_attention
from megatron_longpo.attention.tiles import plan
from megatron_longpo.data.layout import DocumentLayout, RowLayout

LAYOUTS = [RowLayout((DocumentLayout(30 + number, (5, 6)),)) for number in range(3)]
HEADS, GROUPS, HEAD_DIM = 4, 2, 8


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often the kernel ran."""
    counts = {"forward": 0, "backward": 0}
    for name in counts:
        original = getattr(CpuFlashKernel, name)

        def counted(*args: Any, name: str = name, original: Any = original) -> Any:
            counts[name] += 1
            return original(*args)

        monkeypatch.setattr(CpuFlashKernel, name, counted)
    return counts


def row(layout: RowLayout, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (layout.padded_tokens, HEADS + 2 * GROUPS, HEAD_DIM)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def two_layers(layout: RowLayout) -> Callable[[torch.Tensor], torch.Tensor]:
    """Two attentions, the second one on what the first one makes."""

    def layers(fused: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            q, k, v = fused.split((HEADS, GROUPS, GROUPS), 1)
            out = shared_prefix_attention(q, k, v, layout, 1 / math.sqrt(HEAD_DIM))
            fused = torch.cat((out, k.tanh(), v.sin()), 1)
        return fused

    return layers


def kept(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    results = KeptResults()

    def call(x: torch.Tensor) -> torch.Tensor:
        with results.in_use():
            return function(x)

    return call


def test_micro_batches_in_flight_keep_their_own_results(calls: dict[str, int]) -> None:
    plain = [row(layout, seed) for seed, layout in enumerate(LAYOUTS)]
    for x, layout in zip(plain, LAYOUTS, strict=True):
        two_layers(layout)(x).square().sum().backward()
    forwards = sum(2 * len(plan(layout).tiles) for layout in LAYOUTS)
    assert calls == {"forward": forwards, "backward": forwards}

    inputs = [row(layout, seed) for seed, layout in enumerate(LAYOUTS)]
    outputs = [
        checkpoint(kept(two_layers(layout)), x, use_reentrant=True) for x, layout in zip(inputs, LAYOUTS, strict=True)
    ]
    assert calls["forward"] == 2 * forwards
    for number in (1, 0, 2):  # no schedule's order
        outputs[number].square().sum().backward()
    assert calls == {"forward": 2 * forwards, "backward": 2 * forwards}, "attention ran again"
    for expected, actual in zip(plain, inputs, strict=True):
        assert torch.equal(actual.grad, expected.grad)  # type: ignore[arg-type]


def test_a_pass_that_failed_or_had_no_gradients_leaves_nothing_behind() -> None:
    layout, x = LAYOUTS[0], row(LAYOUTS[0], 0)
    layers = two_layers(layout)

    def failing(y: torch.Tensor) -> torch.Tensor:
        layers(y)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        checkpoint(kept(failing), x, use_reentrant=True)
    with torch.no_grad():
        evaluated = layers(x)
    checkpoint(kept(layers), x, use_reentrant=True).square().sum().backward()
    expected = row(layout, 0)
    out = layers(expected)
    out.square().sum().backward()
    assert torch.equal(evaluated, out) and torch.equal(x.grad, expected.grad)  # type: ignore[arg-type]
