"""Saved tensors on the host: copied once however often they are saved, fetched a layer ahead, freed with the graph."""

from __future__ import annotations

import weakref
from unittest.mock import Mock

import pytest
import torch

from megatron_longpo import platform
from megatron_longpo.model import offload
from megatron_longpo.model.offload import OffloadChain


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[platform.HostCopy]]:
    """Every copy that is made, however small its tensor."""
    made: list[weakref.ref[platform.HostCopy]] = []

    class Noted(platform.HostCopy):
        def __init__(self, tensor: torch.Tensor) -> None:
            super().__init__(tensor)
            made.append(weakref.ref(self))

    monkeypatch.setattr(platform, "HostCopy", Noted)
    monkeypatch.setattr(offload, "OFFLOAD_FROM_BYTES", 0)
    return made


def test_a_tensor_is_copied_once_and_weights_stay(copies: list[weakref.ref[platform.HostCopy]]) -> None:
    weight = torch.randn(5, 5, requires_grad=True)
    x = torch.randn(3, 5, requires_grad=True)
    layer = OffloadChain().next([weight])
    with layer.saving():
        y = (x.sin() * x.cos()) @ weight  # sin, cos: x twice; the product: both factors; matmul: its input
    assert len(copies) == 1 + 2 + 1
    grad, weight_grad = torch.autograd.grad(y.sum(), (x, weight))
    expected = torch.autograd.grad(((x.sin() * x.cos()) @ weight).sum(), (x, weight))
    assert torch.equal(grad, expected[0]) and torch.equal(weight_grad, expected[1])
    assert all(copy() is None for copy in copies), "a copy outlived the graph"
    with layer.saving():
        again = x.sin().sum()  # of which there was a copy
    assert torch.equal(torch.autograd.grad(again, x)[0], x.cos())


def test_shapes_of_a_tensor_share_a_copy(copies: list[weakref.ref[platform.HostCopy]]) -> None:
    x = torch.randn(3, 4, requires_grad=True)
    with OffloadChain().next([]).saving():
        out = x * 1
        y = out.sin().sum() + out.view(12).cos().sum() + out.t().sin().sum()
    assert len(copies) == 1 + 1, "rows and columns are two copies"
    (grad,) = torch.autograd.grad(y, x)
    torch.testing.assert_close(grad, 2 * x.cos() - x.sin())


def test_each_state_of_a_tensor_has_a_copy_of_its_own(copies: list[weakref.ref[platform.HostCopy]]) -> None:
    weight = torch.randn(3, requires_grad=True)
    with OffloadChain().next([]).saving():
        x = torch.randn(3)
        out = weight * x
        out = out + weight * x.mul_(2)
    (grad,) = torch.autograd.grad(out.sum(), weight)
    assert len(copies) == 2 and torch.equal(grad, x / 2 + x)


def test_what_stays_must_not_change(monkeypatch: pytest.MonkeyPatch) -> None:
    resident, small = torch.randn(3), torch.randn(3)
    for tensor in (resident, small):
        monkeypatch.setattr(offload, "OFFLOAD_FROM_BYTES", 0 if tensor is resident else 2**20)
        weight = torch.randn(3, requires_grad=True)
        with OffloadChain().next([resident]).saving():
            out = (weight * tensor).sum()
        tensor.zero_()
        with pytest.raises(RuntimeError, match="was changed in place"):
            out.backward()


def test_the_layer_before_is_fetched_ahead(copies: list[weakref.ref[platform.HostCopy]]) -> None:
    chain, x = OffloadChain(), torch.randn(4, requires_grad=True)
    links, y = [], x
    for _ in range(3):
        links.append(chain.next([]))
        with links[-1].saving():
            y = y.sin()
    fetched: list[list[bool]] = []
    for layer in (2, 1, 0):
        links[layer].unpack(copies[layer]())  # type: ignore[arg-type]
        fetched.append([link._fetched for link in links])
    assert fetched == [[False, True, True], [True, True, True], [True, True, True]]


def test_a_layer_gives_memory_back_while_the_next_one_computes(copies: list[weakref.ref[platform.HostCopy]]) -> None:
    """Tensor by tensor, whatever block it belongs to, and the rest when the one after that begins."""

    def on_device() -> list[bool]:
        return [copy() is not None and copy()._tensor is not None for copy in copies]  # type: ignore[union-attr]

    chains, x = [OffloadChain(), OffloadChain()], torch.randn(4, requires_grad=True)
    with chains[0].next([]).saving():
        y = x.sin().cos().exp()
    assert on_device() == [True] * 3
    with chains[1].next([]).saving():
        y = y.sin()
        assert on_device() == [False, True, True, True]
        y = y.cos()
    assert on_device() == [False, False, True, True, True]
    with chains[0].next([]).saving():
        assert on_device() == [False, False, False, True, True]
        y = y.sin()
    (grad,) = torch.autograd.grad(y, x, torch.ones(4))
    expected = x.sin().cos().exp().sin().cos().sin()
    assert torch.equal(grad, torch.autograd.grad(expected, x, torch.ones(4))[0])


def test_what_is_still_on_the_device_is_not_copied_back() -> None:
    tensor = torch.randn(4)
    copy = platform.HostCopy(tensor)
    assert copy.tensor().data_ptr() == tensor.data_ptr()
    copy.release()
    assert torch.equal(copy.tensor(), tensor), "it was asked for"
    released, changed, old = platform.HostCopy(tensor), platform.HostCopy(tensor), tensor.clone()
    released.release()
    tensor.zero_()
    assert torch.equal(released.tensor(), old) and torch.equal(changed.tensor(), old)


def test_a_copy_that_nobody_needs_keeps_its_memory_until_it_is_made() -> None:
    stream = Mock()
    copy = platform.HostCopy(torch.randn(4))
    copy._stream, copy._busy = stream, "copied"
    del copy
    stream.wait_event.assert_called_once_with("copied")


def test_a_forward_pass_that_is_never_differentiated_leaves_nothing(
    copies: list[weakref.ref[platform.HostCopy]],
) -> None:
    chain, x = OffloadChain(), torch.randn(4, requires_grad=True)
    with chain.next([]).saving():
        y = x.sin()
    del y
    assert len(copies) == 1 and copies[0]() is None
