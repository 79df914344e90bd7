"""What is made again instead of kept: the same bits, fewer bytes, nothing left behind."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from megatron_longpo.model.remade import Remaking, remade
from megatron_longpo.model.swiglu import _SwiGLU


def plain_swiglu(gate_and_up: torch.Tensor) -> torch.Tensor:
    """The twin, by autograd."""
    gate, up = gate_and_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_swiglu_equals_its_twin_bit_by_bit(dtype: torch.dtype) -> None:
    x = torch.randn(5, 2, 14, dtype=dtype, requires_grad=True)
    grad = torch.randn(5, 2, 7, dtype=dtype)
    ours, plain = _SwiGLU.apply(x), plain_swiglu(x)
    assert torch.equal(ours, plain)
    assert torch.equal(*(torch.autograd.grad(out, x, grad)[0] for out in (ours, plain)))


def test_swiglu_gradient_is_that_of_finite_differences() -> None:
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(_SwiGLU.apply, (x,))


class Saved:
    """Hooks that note what reaches them: those of an outer keeper of saved tensors."""

    def __init__(self) -> None:
        self.packed: list[torch.Tensor] = []

    def pack(self, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        self.packed.append(tensor)
        return "packed", tensor

    def unpack(self, packed: tuple[str, torch.Tensor]) -> torch.Tensor:
        mark, tensor = packed
        assert mark == "packed"
        return tensor


def chain(x: torch.Tensor, weight: torch.Tensor, make: Callable[..., torch.Tensor]) -> torch.Tensor:
    """A gate into a linear layer that sees a view of it, as Megatron's linear layers save their input."""
    return (make(_SwiGLU.apply, x)[1:] @ weight).sin().sum()


def test_the_input_is_kept_and_not_the_output() -> None:
    x = torch.randn(6, 10, requires_grad=True)
    weight = torch.randn(5, 3, requires_grad=True)
    calls, saved = [], Saved()

    def make(function: Any, *inputs: torch.Tensor) -> torch.Tensor:
        def counted(*inputs: torch.Tensor) -> torch.Tensor:
            calls.append(torch.is_grad_enabled())
            return function(*inputs)

        return remade(counted, *inputs)

    with Remaking(saved.pack, saved.unpack).saving():
        loss = chain(x, weight, make)
    # The gate's input twice, once to make its output again; the weight and the sine's input. Not the output (5, 5).
    assert sorted(tuple(tensor.shape) for tensor in saved.packed) == [(5, 3), (5, 3), (6, 10), (6, 10)]
    assert calls == [True]
    gradients = torch.autograd.grad(loss, (x, weight))
    assert calls == [True, False]
    expected = torch.autograd.grad(chain(x, weight, lambda function, *inputs: function(*inputs)), (x, weight))
    assert all(torch.equal(ours, plain) for ours, plain in zip(gradients, expected, strict=True))


def test_the_output_ends_with_its_last_use_and_the_input_with_the_graph() -> None:
    x = torch.randn(6, 10, requires_grad=True)
    weight = torch.randn(5, 3, requires_grad=True)
    storages: list[weakref.ref[torch.UntypedStorage]] = []

    def make(function: Any, x: torch.Tensor) -> torch.Tensor:
        x = x * 1.0  # stands for the projection in front of the gate
        made = remade(function, x)
        storages.extend(weakref.ref(tensor.untyped_storage()) for tensor in (x, made))
        return made

    with Remaking().saving():
        loss = chain(x, weight, make)
    alive = [storage() is not None for storage in storages]
    assert alive == [True, False]
    loss.backward()
    del loss
    assert storages[0]() is None


def test_inside_of_a_checkpoint_nothing_is_held() -> None:
    """A checkpoint saves by hooks of its own; what it drops must not live on as an input of ours."""
    x = torch.randn(6, 10, requires_grad=True)
    weight = torch.randn(5, 3, requires_grad=True)
    storages: list[weakref.ref[torch.UntypedStorage]] = []

    def make(function: Any, x: torch.Tensor) -> torch.Tensor:
        x = x * 1.0
        storages.append(weakref.ref(x.untyped_storage()))
        return remade(function, x)

    with Remaking().saving():
        loss = checkpoint(chain, x, weight, make, use_reentrant=False)
        assert storages[0]() is None
    gradients = torch.autograd.grad(loss, (x, weight))
    expected = torch.autograd.grad(chain(x, weight, lambda function, *inputs: function(*inputs)), (x, weight))
    assert all(torch.equal(ours, plain) for ours, plain in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("written", ["output", "input"])
def test_an_output_is_kept_as_it_is_when_something_is_written_to(written: str) -> None:
    def gradient(make: Callable[..., torch.Tensor]) -> torch.Tensor:
        scaled = x.clone()
        made = make(torch.mul, scaled, x)
        with torch.no_grad():
            (made if written == "output" else scaled).mul_(2)
        (grad,) = torch.autograd.grad((made @ weight).sum(), weight)
        return grad

    x, weight = torch.randn(6, 5, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    with Remaking().saving():
        ours = gradient(remade)
    assert torch.equal(ours, gradient(lambda function, *inputs: function(*inputs)))


@pytest.mark.parametrize("make", [remade, lambda function, x: function(x).cos()], ids=["an input", "another tensor"])
def test_a_change_before_the_backward_pass_is_an_error_as_without_hooks(make: Callable[..., torch.Tensor]) -> None:
    def loss() -> torch.Tensor:
        x = torch.randn(6, 10, requires_grad=True) * 1.0
        out = chain(x, weight, make)
        x.mul_(2)
        return out

    weight = torch.randn(5, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss().backward()
    with Remaking().saving():
        out = loss()
    with pytest.raises(RuntimeError, match=r"a tensor \(6, 10\) of torch.float32 .* was changed in place"):
        out.backward()


def test_outside_of_a_layer_it_is_the_function() -> None:
    x = torch.randn(6, 10, requires_grad=True)
    assert torch.equal(remade(_SwiGLU.apply, x), plain_swiglu(x))


def test_after_a_layer_nothing_is_held() -> None:
    def made_and_input() -> tuple[torch.Tensor, weakref.ref[torch.UntypedStorage]]:
        x = torch.randn(6)
        return remade(torch.sin, x), weakref.ref(x.untyped_storage())

    remaking = Remaking()
    with remaking.saving():
        results = [made_and_input()]
    results.append(made_and_input())
    assert [storage() for _, storage in results] == [None, None]
