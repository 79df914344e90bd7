"""What a step allocates on CUDA and not on a CPU, where the dry run computes.

Four places differ. The LM head multiplies half precision into fp32 there, without an fp32 copy of its weight. RMSNorm
is one kernel that keeps its input and one number per token. FlashAttention's backward allocates inside its kernel. What
is offloaded is in another memory (`two_memories`). Everything else makes the same tensors in the same order.
"""

# T=tokens H=hidden_size N=query heads G=key/value heads D=head_dim

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from packaging.version import Version

from megatron_longpo.objective import logprobs
from megatron_longpo.planning.ledger import MemoryLedger
from megatron_longpo.planning.replaced import replaced
from megatron_longpo.planning.two_memories import two_memories

NORM_IS_A_KERNEL = Version(torch.__version__) >= Version("2.9")
"""Whether torch has RMSNorm as one kernel on CUDA (pytorch/pytorch#153666). Before it was a formula there too, which
keeps its input in fp32 and what it multiplies by its weight."""

_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@contextmanager
def as_on_gpu(on_gpu: bool, ledger: MemoryLedger) -> Iterator[None]:
    """Let the model allocate inside as it does on CUDA, if that is asked. For fake tensors: results have no values."""
    with ExitStack() as stack:
        if on_gpu:
            stack.enter_context(replaced(logprobs, "_operand", lambda weight: weight))
            if NORM_IS_A_KERNEL:
                stack.enter_context(replaced(torch.nn.RMSNorm, "forward", _fused_norm))
            stack.enter_context(two_memories(ledger))
        yield


def hidden_bytes(func: Any, args: tuple[Any, ...]) -> int:
    """What FlashAttention 2 allocates inside its backward kernel and frees at its end.

    fp32 ``dq`` and row sums, queries rounded up to 128 and the head to 32; with grouped queries also the gradients of
    keys and values for every query head, in half precision. Source: ``mha_bwd`` in PyTorch's
    aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp.
    """
    if func is not _FLASH_BACKWARD:
        return 0
    _, q, k = args[:3]  # [1, N, Tq, D], [1, G, Tk, D]
    _, heads, num_queries, head_dim = q.shape
    _, groups, num_keys, _ = k.shape
    rounded_queries = -(-num_queries // 128) * 128
    rounded_dim = -(-head_dim // 32) * 32
    num_bytes = 4 * heads * rounded_queries * (rounded_dim + 1)
    if heads != groups:
        num_bytes += 2 * heads * num_keys * head_dim * k.element_size()
    return num_bytes


class _FusedNorm(torch.autograd.Function):
    """The allocations of ``aten::_fused_rms_norm`` and its backward on CUDA; no values."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """An empty output like ``hidden``; saves one fp32 number per token."""
        reciprocal_rms = hidden.new_empty((*hidden.shape[:-1], 1), dtype=torch.float32)
        ctx.save_for_backward(hidden, weight, reciprocal_rms)
        return torch.empty_like(hidden)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        """Empty gradients of ``hidden`` and ``weight``."""
        hidden, weight, _ = ctx.saved_tensors
        return torch.empty_like(hidden), torch.empty_like(weight)


def _fused_norm(module: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    return _FusedNorm.apply(hidden, module.weight)
