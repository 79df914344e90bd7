"""Every byte that a step has alive, by the part of the step that asked for it.

A dispatch mode sees each operator's results before Python does. It notes every new storage once, with the place in the
code that made it, and its end by a weak reference, so views and in-place work cost nothing and freed memory is counted
as free. It works on real tensors as on fake ones, which is how it is tested.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import CodeType, FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_longpo.planning.parts import Part, PartCounter

_SOURCES = (
    ("/megatron_longpo/attention/", Part.ATTENTION),
    ("/megatron_longpo/objective/logprobs.py", Part.LM_HEAD),
    ("/megatron/core/optimizer/", Part.OPTIMIZER),
    ("/torch/optim/", Part.OPTIMIZER),
)
"""Files whose allocations have a part of their own."""

_BUFFERS = {"_allgather_base_": slice(0, 1), "_reduce_scatter_base_": slice(1, 2), "alltoall_base_": slice(0, 2)}
"""Collectives of torch that need a buffer larger than what a rank keeps, and which arguments (output, input) it is."""


@dataclass(eq=False)
class _Allocation:
    num_bytes: int
    part: Part
    memory: PartCounter
    alive: bool = True


class MemoryLedger(TorchDispatchMode):
    """Counts live bytes by part while it is entered; keeps the highest total and its parts, and each part's own peak.

    Args:
        answer: Called with every operator before it runs; what is not ``NotImplemented`` is its result. It is how a
            dry run answers for numbers that fake tensors do not have.
        hidden_bytes: Called with every operator and its arguments: what its kernel allocates and frees inside, which
            no dispatch mode sees.

    Attributes:
        device: Memory of the device.
        host: What is allocated inside `on_host`; on a CPU both are the same memory.
    """

    def __init__(
        self,
        answer: Callable[..., Any] | None = None,
        hidden_bytes: Callable[..., int] | None = None,
    ) -> None:
        super().__init__()
        self._answer, self._hidden_bytes = answer, hidden_bytes
        self._known: dict[int, _Allocation] = {}
        self._home: Part | None = Part.WEIGHTS
        self._source: Part | None = None
        self._of_attention: list[_Allocation] = []  # made since attention's code was entered
        self.device, self.host = PartCounter(), PartCounter()
        self._memory = self.device

    @contextmanager
    def everything_is(self, part: Part) -> Iterator[None]:
        """Count all that is allocated inside as one part, as when a model or an optimizer is built."""
        outer, self._home = self._home, part
        try:
            yield
        finally:
            self._home = outer

    @contextmanager
    def by_source(self) -> Iterator[None]:
        """Count what is allocated inside by the code that asks for it: activations unless `_SOURCES` names it."""
        outer, self._home = self._home, None
        try:
            yield
        finally:
            self._home = outer

    @contextmanager
    def on_host(self) -> Iterator[None]:
        """Count what is allocated inside as memory of the host."""
        outer, self._memory = self._memory, self.host
        try:
            yield
        finally:
            self._memory = outer

    def is_on_host(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor was allocated inside `on_host`."""
        known = self._known.get(tensor.untyped_storage()._cdata)
        return known is not None and known.memory is self.host

    def move(self, tensor: torch.Tensor, part: Part) -> None:
        """Count a tensor's storage, whoever made it, as this part from now on."""
        self._move(self._note(tensor), part)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        asks = func.namespace == "prim"  # for a tensor's device and the like: half of all calls
        if not asks:
            self._enter_source()
        result = NotImplemented if self._answer is None else self._answer(func, args, kwargs)
        if result is NotImplemented:
            result = func(*args, **kwargs)
        if asks:
            return result
        for leaf in _tensors(result):
            self._note(leaf)
        if self._home is None and func.namespace == "c10d":
            for leaf in _tensors(args[_BUFFERS.get(func.overloadpacket.__name__, slice(0))]):
                allocation = self._note(leaf)
                if allocation.part in (Part.ACTIVATIONS, Part.ATTENTION):
                    self._move(allocation, Part.COMMUNICATION)
        hidden = 0 if self._hidden_bytes is None else self._hidden_bytes(func, args)
        self.device.settle({Part.ATTENTION: hidden} if hidden else None)
        self.host.settle()
        return result

    def _enter_source(self) -> None:
        source = _source() if self._home is None else self._home
        if source != self._source:
            self._leave_source()
            self._source = source

    def _leave_source(self) -> None:
        """What attention leaves behind is kept for the backward pass or is its result: no workspace."""
        for allocation in self._of_attention:
            if allocation.alive and allocation.part is Part.ATTENTION:
                self._move(allocation, Part.ACTIVATIONS)
        self._of_attention.clear()

    def _note(self, tensor: torch.Tensor) -> _Allocation:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if (known := self._known.get(key)) is not None:
            return known
        made = _Allocation(storage.nbytes(), self._source or Part.ACTIVATIONS, self._memory)
        self._known[key] = made
        if made.part is Part.ATTENTION:
            self._of_attention.append(made)
        made.memory.add(made.part, made.num_bytes)
        weakref.finalize(storage, self._free, key).atexit = False
        return made

    def _free(self, key: int) -> None:
        freed = self._known.pop(key)
        freed.alive = False
        freed.memory.add(freed.part, -freed.num_bytes)

    def _move(self, allocation: _Allocation, part: Part) -> None:
        allocation.memory.add(allocation.part, -allocation.num_bytes)
        allocation.memory.add(part, allocation.num_bytes)
        allocation.part = part


def _tensors(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _source() -> Part | None:
    """The part of the innermost frame whose file has one."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if (part := _part_of(frame.f_code)) is not None:
            return part
        frame = frame.f_back
    return None


@cache
def _part_of(code: CodeType) -> Part | None:
    return next((part for ending, part in _SOURCES if ending in code.co_filename), None)
