"""The libraries behind ``--attention-backend``."""

from __future__ import annotations

import torch

from megatron_longpo.config.training import FLASH, FLASH3, FUSED
from megatron_longpo.platform.devices import default_backend, default_transformer_impl, has_cuda


def device_defaults() -> tuple[str, str, str]:
    """``--transformer-impl``, ``--distributed-backend`` and ``--attention-backend`` where they are ``auto``."""
    return default_transformer_impl(), default_backend(), default_attention_backend()


def default_attention_backend() -> str:
    """Of the kernels that come with torch cuDNN's on Hopper, where it was measured, else FlashAttention 2."""
    return FUSED if has_cuda() and torch.cuda.get_device_capability()[0] == 9 else FLASH


def use_attention_backend(backend: str) -> None:
    """Make a value of ``--attention-backend`` usable in this process.

    FlashAttention 3 takes the place of FlashAttention 2 behind torch's operators, for the rest of the process.

    Raises:
        ValueError: There is no GPU, or the library is missing or does not fit it.
    """
    if backend == FLASH:
        return
    if not has_cuda():
        raise ValueError(f"--attention-backend {backend} needs a GPU: leave it out")
    if backend != FLASH3:
        return
    import torch.nn.attention as attention

    activate = getattr(attention, "activate_flash_attention_impl", None)
    if activate is None:
        raise ValueError(
            f"--attention-backend {FLASH3}: torch {torch.__version__} cannot replace its FlashAttention; update it, or "
            "use --attention-backend fused"
        )
    try:
        activate("FA3")
    except (ImportError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"--attention-backend {FLASH3} needs the package flash_attn_3 (hopper/ of the FlashAttention repository), "
            f"which does not load: {error}; --attention-backend fused needs no package"
        ) from error
