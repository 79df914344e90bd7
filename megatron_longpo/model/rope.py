"""Rotary position embedding from position ids, with Llama 3 and YaRN frequency scaling.

Megatron's rotary modules count positions from 0 along the row. In the shared-prefix layout both branches start at the
prefix's length, so the angles are made from explicit position ids instead.
"""

# T=tokens N=heads D=head_dim

from __future__ import annotations

import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megatron_longpo.config import ModelConfig
from megatron_longpo.gpu_kernels import has_kernels


def inverse_frequencies(model: ModelConfig) -> torch.Tensor:
    """The rotary angle per position of every pair of head dimensions.

    Llama 3 scaling: frequencies of long wavelength are divided by the factor, those of short wavelength are kept, those
    between are interpolated (Llama 3.1 model card). YaRN: the same idea with a ramp over dimensions (arXiv 2309.00071,
    Eq. 19-23). Operations are in fp32 in the order that Hugging Face's models use, so that long positions agree.

    Args:
        model: Shape, rotary base and scaling of the model.

    Returns:
        fp32 ``[D / 2]``, CPU.
    """
    dim, base = model.kv_channels, float(model.rotary_base)
    inverse = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if model.position_embedding_type == "yarn":
        return _yarn(model, inverse, base)
    if model.use_rope_scaling:
        return _llama3(model, inverse)
    return inverse


def attention_factor(model: ModelConfig) -> float:
    """The factor on queries and on keys that goes with the frequency scaling (YaRN's temperature, else 1)."""
    if model.position_embedding_type != "yarn":
        return 1.0
    factor, mscale, mscale_all = model.yarn_rotary_scaling_factor, model.yarn_mscale, model.yarn_mscale_all_dim

    def temperature(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if mscale is not None and mscale_all is not None:
        return temperature(mscale) / temperature(mscale_all)
    return temperature(1.0)


def rotary_angles(position_ids: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Angles in the form that Megatron's ``apply_rotary_pos_emb`` takes, and `rotate` behind it.

    Args:
        position_ids: int64 ``[T]``.
        inverse: fp32 ``[D / 2]`` of `inverse_frequencies`, on the same device.

    Returns:
        fp32 ``[T, 1, 1, D]``, the two halves equal (non-interleaved rotation).
    """
    angles = torch.outer(position_ids.to(inverse.dtype), inverse)
    return torch.cat((angles, angles), dim=-1)[:, None, None, :]


def rotate(heads: torch.Tensor, angles: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """Rotate the two halves of every head against each other; saves nothing but the angles. No collectives.

    Megatron's own keeps cosines and sines ``[T, D]`` of every layer, twice, and passes over the heads six times.

    Args:
        heads: ``[T, 1, N, D]``, any strides but the last.
        angles: fp32 ``[T, 1, 1, D]`` of `rotary_angles`.
        interleaved: Must be off: the halves are rotated, not neighbours.

    Returns:
        ``[T, 1, N, D]``, contiguous.
    """
    assert not interleaved and heads.shape[-1] == angles.shape[-1] and heads.shape[1] == 1
    return _Rotation.apply(heads, angles)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        """`rotate`."""
        ctx.save_for_backward(angles)
        return _rotated(heads, angles, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The gradient, turned back."""
        (angles,) = ctx.saved_tensors
        return _rotated(grad, angles, -1.0), None


def _rotated(heads: torch.Tensor, angles: torch.Tensor, direction: float) -> torch.Tensor:
    half = angles[..., : angles.shape[-1] // 2]
    cos, sin = half.cos(), half.sin().mul_(direction)
    if has_kernels(heads):
        from megatron_longpo.gpu_kernels.rotation import rotated

        return rotated(heads, cos, sin)
    cos, sin = cos.to(heads.dtype), sin.to(heads.dtype)
    result = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
    (first, second), (to_first, to_second) = heads.chunk(2, dim=-1), result.chunk(2, dim=-1)
    torch.mul(first, cos, out=to_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=to_second).addcmul_(first, sin)
    return result


def _llama3(model: ModelConfig, inverse: torch.Tensor) -> torch.Tensor:
    factor, low, high = model.rope_scaling_factor, model.rope_low_freq_factor, model.rope_high_freq_factor
    turns = model.rope_original_max_position_embeddings / (2 * math.pi / inverse)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * inverse / factor + keep * inverse


def _yarn(model: ModelConfig, inverse: torch.Tensor, base: float) -> torch.Tensor:
    half = inverse.numel()

    def dimension_of(num_rotations: float) -> float:
        wavelength = model.yarn_original_max_position_embeddings / (num_rotations * 2 * math.pi)
        return half * math.log(wavelength) / math.log(base)

    low, high = dimension_of(model.yarn_beta_fast), dimension_of(model.yarn_beta_slow)
    if model.yarn_correction_range_round_to_int:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    ramp = ((torch.arange(half, dtype=torch.float32) - low) / max(high - low, 1e-3)).clamp(0, 1)
    keep = 1 - ramp
    return inverse / model.yarn_rotary_scaling_factor * (1 - keep) + inverse * keep
