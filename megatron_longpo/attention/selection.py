"""Which attention kernel serves a device and a dtype."""

from __future__ import annotations

import torch

from megatron_longpo.attention.grouped import FoldedRectangles
from megatron_longpo.attention.kernels import AttentionKernel, CpuFlashKernel, CudaEfficientKernel, CudaFlashKernel


def select_kernel(device: torch.device, dtype: torch.dtype) -> AttentionKernel:
    """The kernel for tensors of this device and dtype.

    Raises:
        ValueError: There is none.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    if device.type == "cpu" and (half or dtype in (torch.float32, torch.float64)):
        return FoldedRectangles(CpuFlashKernel())
    if device.type == "cuda" and half:
        return FoldedRectangles(CudaFlashKernel())
    if device.type == "cuda" and dtype == torch.float32:
        return FoldedRectangles(CudaEfficientKernel())
    raise ValueError(
        f"no attention kernel for {dtype} on {device.type}: CUDA has bf16, fp16 and fp32, the CPU fp64 too; give --bf16"
    )
