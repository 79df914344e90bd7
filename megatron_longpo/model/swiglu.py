"""The gate of the MLP, ``silu(gate) * up``, keeping its input and nothing else."""

# T=tokens of this rank F=ffn_hidden_size of this tensor-parallel rank

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch.autograd.function import once_differentiable

from megatron_longpo.gpu_kernels import has_kernels
from megatron_longpo.model.remade import remade


class SwiGLU(MegatronModule):
    """The activation of Megatron's MLP as a module of its own, which ``use_te_activation_func`` lets a spec choose.

    Megatron's plain one keeps five ``[T, F]``: gate and up, silu(gate), a copy of up, and the product. This keeps gate
    and up. On a CPU it has the same values and gradients, bit by bit, from the same operators with fewer passes over
    memory; on a GPU one kernel rounds once where they round twice. Megatron's fused one keeps three and needs a
    compiler, which rows of ever new lengths would call again and again.

    Args:
        config: Megatron's configuration; unused.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config=config)

    def forward(self, gate_and_up: torch.Tensor) -> torch.Tensor:
        """``[…, 2F]`` to ``[…, F]``."""
        return remade(_SwiGLU.apply, gate_and_up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: torch.Tensor) -> torch.Tensor:
        """``[…, 2F]`` to ``[…, F]``; saves its input alone."""
        ctx.save_for_backward(gate_and_up)
        if has_kernels(gate_and_up):
            from megatron_longpo.gpu_kernels.swiglu import swiglu

            return swiglu(gate_and_up)
        gate, up = gate_and_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        """The gradient ``[…, 2F]`` of gate and up, from ``[…, F]``, in one new tensor."""
        (gate_and_up,) = ctx.saved_tensors
        if has_kernels(gate_and_up):
            from megatron_longpo.gpu_kernels.swiglu import swiglu_gradient

            return swiglu_gradient(grad, gate_and_up)
        gate, up = gate_and_up.chunk(2, dim=-1)
        result = torch.empty_like(gate_and_up)
        grad_gate, grad_up = result.chunk(2, dim=-1)
        torch.mul(grad, up, out=grad_gate)
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        torch.ops.aten.silu.out(gate, out=grad_up)
        grad_up.mul_(grad)
        return result
