"""Moving tensors to host memory and back on streams of their own."""

from __future__ import annotations

import functools
from typing import Any

import torch

LARGEST_PIECE_BYTES, SMALLEST_PIECE_BYTES = 2**28, 2**20


def piece_bytes(num_bytes: int) -> list[int]:
    """Sizes of the pinned buffers that hold so many bytes.

    torch rounds a pinned buffer up to a power of two, which for one buffer can be twice the memory: a row of 132,096
    tokens would take that of 262,144. In powers of two from the start nothing is rounded but the last piece, by less
    than `SMALLEST_PIECE_BYTES`. Source: ``CachingHostAllocatorImpl::allocate`` in torch's CachingHostAllocator.h.
    """
    pieces = [LARGEST_PIECE_BYTES] * (num_bytes // LARGEST_PIECE_BYTES)
    rest, size = num_bytes % LARGEST_PIECE_BYTES, LARGEST_PIECE_BYTES // 2
    while size >= SMALLEST_PIECE_BYTES:
        if rest & size:
            pieces.append(size)
        size //= 2
    last = rest % SMALLEST_PIECE_BYTES
    return [*pieces, last] if last else pieces


def pieces_of(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The memory of a contiguous tensor as views of `piece_bytes`, uint8."""
    return tensor.view(-1).view(torch.uint8).split(piece_bytes(tensor.nbytes))


class HostCopy:
    """A copy of a device's tensor in pinned host memory, made and brought back behind computation.

    On a CPU it is a plain copy in the same memory: it saves nothing there, and behaves the same.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._device, self._shape, self._dtype = tensor.device, tensor.shape, tensor.dtype
        self._returned: torch.Tensor | None = None
        if not tensor.is_cuda:
            self._host = tensor.clone()
            return
        to_host, _ = _copy_streams()
        to_host.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(to_host):
            self._pieces = []
            for piece in pieces_of(tensor.contiguous()):
                self._pieces.append(torch.empty(piece.shape, dtype=piece.dtype, pin_memory=True))
                self._pieces[-1].copy_(piece, non_blocking=True)
            self._made = to_host.record_event()
        # The allocator must not give the memory away before it is copied.
        tensor.record_stream(to_host)

    def start_return(self) -> None:
        """Start to copy back."""
        if self._returned is not None:
            return
        if self._device.type != "cuda":
            self._returned = self._host
            return
        _, to_device = _copy_streams()
        to_device.wait_event(self._made)
        with torch.cuda.stream(to_device):
            self._returned = torch.empty(self._shape, dtype=self._dtype, device=self._device)
            for piece, host in zip(pieces_of(self._returned), self._pieces, strict=True):
                piece.copy_(host, non_blocking=True)
            self._arrived = to_device.record_event()

    def tensor(self) -> torch.Tensor:
        """The tensor on its device; work queued from now on waits for it."""
        self.start_return()
        assert self._returned is not None
        if self._device.type == "cuda":
            torch.cuda.current_stream().wait_event(self._arrived)
            self._returned.record_stream(torch.cuda.current_stream())
        return self._returned


@functools.cache
def _copy_streams() -> tuple[Any, Any]:
    """To the host and to the device: a bus carries both at once."""
    return torch.cuda.Stream(), torch.cuda.Stream()
