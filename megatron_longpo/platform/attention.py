"""The libraries behind ``--attention-backend``."""

from __future__ import annotations

import torch

from megatron_longpo.config.training import FLASH, FLASH3, FUSED
from megatron_longpo.platform.devices import default_backend, default_transformer_impl, has_cuda

SOUND_CUDNN = (9, 15, 1)
"""From here on cuDNN's backward pass stays within its tensors if the keys are no multiple of 128 (release notes of
cudnn-frontend 1.16). torch prefers it from here on, too (``check_prefer_cudnn_attention``)."""


def device_defaults() -> tuple[str, str, str]:
    """``--transformer-impl``, ``--distributed-backend`` and ``--attention-backend`` where they are ``auto``."""
    return default_transformer_impl(), default_backend(), default_attention_backend()


def default_attention_backend() -> str:
    """Of the kernels that come with torch cuDNN's on Hopper, where it was measured, else FlashAttention 2."""
    return FUSED if _is_hopper() and _cudnn_version() >= SOUND_CUDNN else FLASH


def attention_note() -> str | None:
    """What to say where `default_attention_backend` passes over cuDNN for its version; None elsewhere."""
    if not _is_hopper() or _cudnn_version() >= SOUND_CUDNN:
        return None
    return f"--attention-backend auto: flash, though cuDNN's kernel is faster on this GPU. {_too_old()}"


def _is_hopper() -> bool:
    return has_cuda() and torch.cuda.get_device_capability()[0] == 9


def _cudnn_version() -> tuple[int, int, int]:
    """Of the library that is loaded; zeros if there is none."""
    version = torch.backends.cudnn.version() or 0
    return version // 10000, version // 100 % 100, version % 100


def _too_old() -> str:
    found, sound = (".".join(map(str, version)) for version in (_cudnn_version(), SOUND_CUDNN))
    return (
        f"cuDNN {found} is loaded, whose backward pass may leave its tensors; {sound} mended that: update torch, or "
        "the package nvidia-cudnn-cu12 or nvidia-cudnn-cu13"
    )


def use_attention_backend(backend: str) -> None:
    """Make a value of ``--attention-backend`` usable in this process.

    FlashAttention 3 takes the place of FlashAttention 2 behind torch's operators, for the rest of the process.

    Raises:
        ValueError: There is no GPU, or the library is missing, too old or does not fit it.
    """
    if backend == FLASH:
        return
    if not has_cuda():
        raise ValueError(f"--attention-backend {backend} needs a GPU: leave it out")
    if backend == FUSED:
        if _cudnn_version() < SOUND_CUDNN:
            raise ValueError(f"--attention-backend {FUSED}: {_too_old()}; or use --attention-backend {FLASH}")
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
