"""Attention results that outlive activation recomputation, so that attention itself runs once.

Recomputation calls a group of layers twice: without gradients in the forward pass, with them in the backward pass.
Attention is most of a long layer's work, and its backward needs little of its forward: the output and the log-sum-exps.
Kept from the first call they make the second one cheap; queries, keys and values are projected again.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch

Result = tuple[torch.Tensor, torch.Tensor]


class KeptResults:
    """The (out, lse) of every attention in one recomputed group of layers, for one micro-batch.

    It belongs to the function that the checkpoint calls twice and is freed with it, so micro-batches in flight, passes
    that failed and graphs that are never differentiated cannot mix up or leave anything behind.

    Args:
        pack: Called on every tensor that is kept; what it returns is kept in its place (`offload.LayerOffload.pack`).
        unpack: Undoes ``pack``.
    """

    def __init__(
        self,
        pack: Callable[[torch.Tensor], Any] = lambda tensor: tensor,
        unpack: Callable[[Any], torch.Tensor] = lambda kept: kept,
    ) -> None:
        self._pack, self._unpack = pack, unpack
        self._results: deque[tuple[Any, Any]] = deque()
        self._replaying = False

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Attention inside is kept if gradients are off, and taken from what was kept if they are on."""
        # Asked here: inside an autograd function gradients are always off.
        self._replaying = torch.is_grad_enabled()
        token = _in_use.set(self)
        try:
            yield
        finally:
            _in_use.reset(token)

    @property
    def all_handed_out(self) -> bool:
        """Whether the last result of the group was handed out: the backward pass of its attention comes next."""
        return self._replaying and not self._results

    def get(self, compute: Callable[[], Result]) -> Result:
        """The next result, in the order of the calls; each is handed out once, so they are freed layer by layer."""
        if not self._replaying:
            out, lse = compute()
            self._results.append((self._pack(out), self._pack(lse)))
            return out, lse
        assert self._results, "a group of layers was recomputed twice, or recomputed other layers than it computed"
        packed_out, packed_lse = self._results.popleft()
        return self._unpack(packed_out), self._unpack(packed_lse)


# A context variable, not a global: on CUDA the backward pass runs in a thread of autograd's.
_in_use: ContextVar[KeptResults | None] = ContextVar("kept attention results", default=None)


def computed_once(compute: Callable[[], Result]) -> Result:
    """The (out, lse) of an attention: computed, or kept since the first call under recomputation.

    For the ``forward`` of an autograd function, whose collectives, if any, are in ``compute``.
    """
    kept = _in_use.get()
    return compute() if kept is None else kept.get(compute)


def backward_follows() -> bool:
    """Whether the attention that was just taken from what was kept is the next one whose backward pass runs."""
    kept = _in_use.get()
    return kept is not None and kept.all_handed_out
