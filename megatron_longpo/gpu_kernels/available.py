"""Whether the kernels of this package can be used on a tensor."""

from __future__ import annotations

import functools
import warnings

import torch


def has_kernels(tensor: torch.Tensor) -> bool:
    """Whether the kernels take a tensor: on CUDA, in fp32 or half precision, where Triton works."""
    return tensor.is_cuda and tensor.dtype != torch.float64 and _triton_works(tensor.device)


@functools.cache
def _triton_works(device: torch.device) -> bool:
    """Compile and run the smallest kernel: Triton may be missing, or what it compiles with (a C compiler, Python.h)."""
    try:
        from megatron_longpo.gpu_kernels.swiglu import swiglu

        swiglu(torch.zeros(1, 2, device=device))
    except Exception as error:  # whatever its compilers raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        warnings.warn(
            f"Triton's kernels do not run here ({reason[-1]}): torch's operators take their place, which makes steps "
            "slower; Triton needs a C compiler and Python's headers (python3-dev), and to write in ~/.triton",
            stacklevel=2,
        )
        return False
    return True
