"""Saved activations that wait for the backward pass in host memory (``--cpu-offloading-num-layers``).

A layer's saved tensors are copied to pinned host memory behind its computation and that of the layer after it, which
gives the device's memory back: its first tensor that of the first one, and so on. So about one layer is on its way, and
the layer that computed last stays where it is if the backward pass comes next. That of a layer asks for its own tensors
back and, at the same time, for those of the layer that comes next, so that these arrive while it computes.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from megatron_longpo import platform
from megatron_longpo.model.unchanged import Unchanged

OFFLOAD_FROM_BYTES = 2**20
"""Smaller tensors stay: log-sum-exps of short rows, scalars."""


@dataclass(frozen=True)
class HostView:
    """A shape of a tensor on the host."""

    copy: platform.HostCopy
    shape: torch.Size

    def tensor(self) -> torch.Tensor:
        """The tensor on its device."""
        return self.copy.tensor().view(self.shape)


Packed = Unchanged | HostView


class LayerOffload:
    """The saved tensors of one layer, or of one recomputed group of layers, for one micro-batch.

    Args:
        previous: That of the layer before, whose tensors the backward pass needs next.
        resident: Tensors that stay on the device: weights, and what all layers share.
    """

    _newest: ClassVar[weakref.ref[LayerOffload] | None] = None
    """The layer that computed last, of any block and micro-batch: its tensors are on their way."""

    def __init__(self, previous: LayerOffload | None, resident: Iterable[torch.Tensor]) -> None:
        self._previous = weakref.ref(previous) if previous is not None else None
        # By storage, not address: the tensors of a dry run have none.
        self._resident = {tensor.untyped_storage()._cdata for tensor in resident}
        # Weak: a copy is freed with the last node of the graph that needs it.
        self._copies: list[tuple[weakref.ref[torch.UntypedStorage], tuple[object, ...], weakref.ref]] = []
        self._fetched = False
        newest = LayerOffload._newest() if LayerOffload._newest is not None else None
        self._on_its_way = newest.copies() if newest is not None else iter(())
        if newest is not None:
            newest.release_before()
        LayerOffload._newest = weakref.ref(self)

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """What autograd saves inside goes to the host."""
        with torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack):
            yield

    def pack(self, tensor: torch.Tensor) -> Packed:
        """What stands for a saved tensor: its copy, or itself if it stays."""
        storage = tensor.untyped_storage()
        if tensor.nbytes < OFFLOAD_FROM_BYTES or storage._cdata in self._resident:
            return Unchanged(tensor)
        if tensor.device != platform.device():
            return Unchanged(tensor)
        # Several operations save the same tensor, each by an object of its own, and in shapes of their own: attention
        # its output by heads, the projection behind it the same as one vector per token.
        size = (tensor.numel(),) if tensor.is_contiguous() else (tensor.shape, tensor.stride())
        place = (tensor.storage_offset(), *size, tensor.dtype, tensor._version)
        for owner, known, copy in self._copies:
            found = copy()
            if owner() is storage and known == place and found is not None:
                return HostView(found, tensor.shape)
        made = platform.HostCopy(tensor)
        if (before := next(self._on_its_way, None)) is not None:
            before.release()
        self._copies.append((weakref.ref(storage), place, weakref.ref(made)))
        return HostView(made, tensor.shape)

    def unpack(self, packed: Packed) -> torch.Tensor:
        """The saved tensor, on the device again."""
        if isinstance(packed, Unchanged):
            return packed.tensor()
        self.fetch()
        previous = self._previous() if self._previous is not None else None
        if previous is not None:
            previous.fetch()
        return packed.tensor()

    def fetch(self) -> None:
        """Start to bring back what is needed still."""
        if self._fetched:
            return
        self._fetched = True
        for copy in self.copies():
            copy.start_return()

    def copies(self) -> Iterator[platform.HostCopy]:
        """Those that are needed still, in the order in which they were made."""
        for _, _, reference in self._copies:
            if (copy := reference()) is not None:
                yield copy

    def release_before(self) -> None:
        """Give back what the layer before has on the device still."""
        for copy in self._on_its_way:
            copy.release()


class OffloadChain:
    """Makes the `LayerOffload`s of a block, each knowing the one before it."""

    def __init__(self) -> None:
        self._last: weakref.ref[LayerOffload] | None = None

    def next(self, resident: Iterable[torch.Tensor]) -> LayerOffload:
        """For the layer that computes now."""
        link = LayerOffload(self._last() if self._last is not None else None, resident)
        self._last = weakref.ref(link)
        return link
