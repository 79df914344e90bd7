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

    The device's memory is the compute stream's all the time: it is given back, and used again, in the order of that
    stream, which first waits for the copy. Left to ``Tensor.record_stream``, it could be used again once the host has
    seen that the copy is done, and the host is many layers ahead of the device: their memory would be taken all at
    once.

    On a CPU it is a plain copy in the same memory: it saves nothing there, and behaves the same.

    Args:
        tensor: What to copy. It stays on the device until `release`.
    """

    _busy: Any = None
    """The event behind which a copy has left the tensor's memory alone; None once the compute stream waits for it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor: torch.Tensor | None = tensor.detach()
        self._version = tensor._version
        self._returns = False
        self._stream: Any = torch.cuda.current_stream() if tensor.is_cuda else None
        self._send(tensor)

    def release(self) -> None:
        """Give the device's memory back: what is queued from now on waits for the copy and may use it."""
        if not self._returns:
            self._wait()
            self._tensor = None

    def start_return(self) -> None:
        """Start to copy back, unless the tensor is still there as it was."""
        if self._returns:
            return
        self._returns = True
        if self._tensor is None or self._tensor._version != self._version:
            self._wait()
            self._tensor = self._bring_back()

    def tensor(self) -> torch.Tensor:
        """The tensor on its device; work queued from now on waits for it."""
        self.start_return()
        self._wait()
        assert self._tensor is not None
        return self._tensor

    def __del__(self) -> None:
        self._wait()

    def _wait(self) -> None:
        if self._busy is not None:
            self._stream.wait_event(self._busy)
            self._busy = None

    def _send(self, tensor: torch.Tensor) -> None:
        self._shape, self._dtype, self._device = tensor.shape, tensor.dtype, tensor.device
        if self._stream is None:
            self._host = tensor.clone()
            return
        to_host, _ = _copy_streams()
        to_host.wait_stream(self._stream)
        with torch.cuda.stream(to_host):
            self._pieces = []
            for piece in pieces_of(tensor.contiguous()):
                self._pieces.append(torch.empty(piece.shape, dtype=piece.dtype, pin_memory=True))
                self._pieces[-1].copy_(piece, non_blocking=True)
            self._busy = to_host.record_event()

    def _bring_back(self) -> torch.Tensor:
        if self._stream is None:
            return self._host
        returned = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        _, to_device = _copy_streams()
        # It may still use this memory for something else, and has waited for the copy on the host.
        to_device.wait_stream(self._stream)
        with torch.cuda.stream(to_device):
            for piece, host in zip(pieces_of(returned), self._pieces, strict=True):
                piece.copy_(host, non_blocking=True)
            self._busy = to_device.record_event()
        return returned


@functools.cache
def _copy_streams() -> tuple[Any, Any]:
    """To the host and to the device: a bus carries both at once."""
    return torch.cuda.Stream(), torch.cuda.Stream()
