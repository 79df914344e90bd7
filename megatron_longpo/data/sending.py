"""Tensors on their way to a device."""

from __future__ import annotations

import torch


def sent(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """The tensor on another device; the host does not wait until it is there.

    CUDA copies from ordinary host memory only once all queued work is done, so the tensor goes through pinned memory.

    Args:
        tensor: Any.
        device: Where it is used.
    """
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
