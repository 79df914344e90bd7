"""Whether the kernels of this package can be used on a tensor."""

from __future__ import annotations

import functools
import importlib.util

import torch


def has_kernels(tensor: torch.Tensor) -> bool:
    """Whether the kernels take a tensor: on CUDA, in fp32 or half precision, where Triton is, as it is with torch."""
    return tensor.is_cuda and tensor.dtype != torch.float64 and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
