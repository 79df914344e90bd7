"""Transfers at their latest: a result that is right under them does not hang on how fast the others were."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_longpo.attention import all_gather


@contextlib.contextmanager
def late_transfers() -> Iterator[None]:
    """Use the memory of the transfers that wait behind computation as badly as a device may.

    What is received is NaN until it is waited for, what is sent becomes NaN afterwards, and memory that nothing was
    written to is NaN. What changes between the start of a transfer and its end is an AssertionError: it may be sent
    before or after the change.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_all_gather", "_reduce_scatter"):
            patch.setattr(all_gather, name, _late(getattr(all_gather, name)))
        patch.setattr(dist, "all_to_all_single", _late(dist.all_to_all_single))
        patch.setattr(dist, "batch_isend_irecv", _late_batch(dist.batch_isend_irecv))
        patch.setattr(dist, "all_reduce", _late_in_place(dist.all_reduce))
        # Fresh memory is filled, as is torch's default, where algorithms must be deterministic.
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


class _LateWork:
    """A transfer between copies of the tensors that it was asked for."""

    def __init__(self) -> None:
        self._sent: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._received: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.works: list[Any] = []

    def sending(self, tensor: torch.Tensor) -> torch.Tensor:
        self._sent.append((tensor, tensor.clone()))
        return self._sent[-1][1]

    def receiving(self, tensor: torch.Tensor) -> torch.Tensor:
        self._received.append((tensor, torch.empty_like(tensor)))
        tensor.fill_(torch.nan)
        return self._received[-1][1]

    def changing(self, tensor: torch.Tensor) -> torch.Tensor:
        self._received.append((tensor, tensor.clone()))
        tensor.fill_(torch.nan)
        return self._received[-1][1]

    def wait(self) -> None:
        for work in self.works:
            work.wait()
        for tensor, copy in self._sent:
            assert torch.equal(tensor, copy), "what is sent was changed, or never written"
            tensor.fill_(torch.nan)
        for tensor, copy in self._received:
            tensor.copy_(copy)


def _late(collective: Callable[..., Any]) -> Callable[..., Any]:
    """Of one that takes output and input."""

    def call(output: torch.Tensor, given: torch.Tensor, group: dist.ProcessGroup, async_op: bool = False) -> Any:
        late = _LateWork()
        late.works.append(collective(late.receiving(output), late.sending(given), group=group, async_op=True))
        return late if async_op else late.wait()

    return call


def _late_in_place(collective: Callable[..., Any]) -> Callable[..., Any]:
    def call(tensor: torch.Tensor, *args: Any, async_op: bool = False, **options: Any) -> Any:
        if not async_op:  # Nothing can come before its end, and Megatron's may be one of several made one by torch.
            return collective(tensor, *args, **options)
        late = _LateWork()
        late.works.append(collective(late.changing(tensor), *args, async_op=True, **options))
        return late

    return call


def _late_batch(batch: Callable[..., Any]) -> Callable[..., Any]:
    def call(operations: list[dist.P2POp]) -> list[_LateWork]:
        late = _LateWork()
        copies = [late.sending(o.tensor) if o.op is dist.isend else late.receiving(o.tensor) for o in operations]
        late.works = batch(
            [dist.P2POp(o.op, copy, o.peer, o.group, o.tag) for o, copy in zip(operations, copies, strict=True)]
        )
        return [late]

    return call
