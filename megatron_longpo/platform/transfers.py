"""Moving tensors: between pipeline ranks, and to host memory and back on streams of their own."""

from __future__ import annotations

import functools
from typing import Any

import torch

from megatron_longpo.platform.devices import has_cuda


def pipeline_options(pipeline_size: int, interleaved: bool) -> dict[str, bool]:
    """TransformerConfig fields for point-to-point transfers.

    With two pipeline ranks both neighbours are the same rank, and gloo matches messages by order alone: the batched
    transfers of the interleaved schedule then cross and give silently wrong results. The overlapped form is right.
    """
    if not has_cuda() and interleaved and pipeline_size == 2:
        return {"batch_p2p_comm": False, "overlap_p2p_comm": True}
    return {"batch_p2p_comm": not interleaved, "overlap_p2p_comm": interleaved}


class HostCopy:
    """A copy of a device's tensor in pinned host memory, made and brought back behind computation.

    On a CPU it is a plain copy in the same memory: it saves nothing there, and behaves the same.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._device = tensor.device
        self._returned: torch.Tensor | None = None
        if not tensor.is_cuda:
            self._host = tensor.clone()
            return
        to_host, _ = _copy_streams()
        to_host.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(to_host):
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
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
            self._returned = self._host.to(self._device, non_blocking=True)
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
