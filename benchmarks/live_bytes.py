"""Peak bytes of live tensors, counted and not sampled: the same number on every run, on a CPU too.

The resident set of a process holds freed memory that was not given back; this counts what tensors own. Memory inside of
an operator, and outside of torch, is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_longpo import platform


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators return inside of it, from their first sight to their end.

    Attributes:
        now: Bytes of live storages that were made inside.
        peak: The most that `now` has been.
        on_host: Bytes of those that are offloaded; on a CPU, where host and device are one, they are left out of `now`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.on_host = 0
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for tensor in _tensors((args, tuple((kwargs or {}).values()))):
            self._know(tensor.untyped_storage(), 0)
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._know(tensor.untyped_storage(), tensor.untyped_storage().nbytes())
        return result

    def _know(self, storage: torch.UntypedStorage, nbytes: int) -> None:
        """Storages that come in from outside count nothing."""
        key = id(storage)
        known = self._seen.get(key)
        if known is not None and known() is storage:
            return
        self._seen[key] = weakref.ref(storage)
        if nbytes:
            self.now += nbytes
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._end, nbytes)

    def _end(self, nbytes: int) -> None:
        self.now -= nbytes

    @contextmanager
    def hosts_left_out(self) -> Iterator[None]:
        """Copies in host memory do not count as the device's, until they are brought back."""
        copies: Any = platform.HostCopy
        send, bring_back = copies._send, copies._bring_back
        counted = self

        def sent(copy: platform.HostCopy, tensor: torch.Tensor) -> None:
            before, peak = counted.now, counted.peak
            send(copy, tensor)
            added = counted.now - before
            counted.now, counted.peak = before, peak
            counted.on_host += added
            # What the end of the storage will take off again was never added.
            weakref.finalize(copy._host.untyped_storage(), counted._end, -added)

        def brought_back(copy: platform.HostCopy) -> torch.Tensor:
            # On a CPU the copy itself comes back; count it as the device's from here on.
            nbytes = copy._host.untyped_storage().nbytes()
            counted.now += nbytes
            counted.peak = max(counted.peak, counted.now)
            weakref.finalize(copy._host.untyped_storage(), counted._end, nbytes)
            return bring_back(copy)

        copies._send, copies._bring_back = sent, brought_back
        try:
            yield
        finally:
            copies._send, copies._bring_back = send, bring_back


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    """Tensors among the arguments or the results of an operator, which are none, themselves or in lists.

    torch's walk through any tree takes longer than small operators do.
    """
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)
