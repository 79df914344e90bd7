"""Which attention kernel serves a device and a dtype (``--attention-backend``)."""

from __future__ import annotations

import torch

from megatron_longpo.attention.cudnn import CudnnKernel
from megatron_longpo.attention.grouped import FoldedRectangles
from megatron_longpo.attention.kernels import AttentionKernel, CpuFlashKernel, CudaEfficientKernel, CudaFlashKernel
from megatron_longpo.config.training import FLASH, FUSED


def select_kernel(device: torch.device, dtype: torch.dtype, backend: str = FLASH) -> AttentionKernel:
    """The kernel for tensors of this device and dtype.

    Args:
        device: CPU or CUDA.
        dtype: Of queries, keys and values.
        backend: A value of ``--attention-backend``, for half precision on CUDA; the others have one kernel.

    Raises:
        ValueError: There is none.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    if device.type == "cpu" and (half or dtype in (torch.float32, torch.float64)):
        return FoldedRectangles(CpuFlashKernel())
    if device.type == "cuda" and half:
        # FlashAttention 3 takes the place of torch's own behind the same operators (`platform.use_attention_backend`).
        return CudnnKernel() if backend == FUSED else FoldedRectangles(CudaFlashKernel())
    if device.type == "cuda" and dtype == torch.float32:
        return FoldedRectangles(CudaEfficientKernel())
    raise ValueError(
        f"no attention kernel for {dtype} on {device.type}: CUDA has bf16, fp16 and fp32, the CPU fp64 too; give --bf16"
    )
