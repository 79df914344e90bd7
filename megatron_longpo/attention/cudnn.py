"""cuDNN's attention, the faster one on Hopper and Blackwell, behind the interface of the other kernels.

Where its backward pass is known to go wrong, FlashAttention computes instead. Its faults need log-sum-exps below -88.7,
where exp(-lse) is infinite in fp32. Heads of real models have them: one of Qwen2.5 0.5B does (huggingface/trl#7181).
"""

# Tq=queries Tk=keys N=query heads G=key/value heads D=head_dim

from __future__ import annotations

import torch

from megatron_longpo.attention.kernels import (
    NO_DROPOUT,
    AttentionKernel,
    CudaFlashKernel,
    aten,
    heads_first,
    tokens_first,
)

_INSTEAD = CudaFlashKernel()

KEY_BLOCK = 128
"""Keys that a block of cuDNN's backward kernel for Hopper takes, in two halves."""


class CudnnKernel(AttentionKernel):
    """cuDNN on CUDA: bf16 and fp16, grouped queries natively, any strides but the last.

    Its log-sum-exps are natural logarithms, one per query and head, and its backward pass takes them and the output as
    arguments: torch's own ring attention merges them across ranks by the same rule
    (``torch.distributed.tensor.experimental``). A plan is made for every new shape, once, on the host.

    Left to FlashAttention:

    - a single query or key. cuDNN refuses one on one, has no backward pass for a single key (its release notes), and
      returns NaN in dk and dv for a single query (NVIDIA/cudnn-frontend#1072, seen with 9.25 and 9.26);
    - in the backward pass, the last 64 keys of a rectangle with 64 more than a multiple of 128. Half of the last block
      lies behind the keys then, and is not masked: exp(0 - lse) overflows and dq is NaN (pytorch/pytorch#196678,
      NVIDIA/cudnn-frontend#628, seen from 9.19 to 9.30). In a causal square the mask covers that half.
    """

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `AttentionKernel.forward`, in bf16 or fp16; ValueError for a head_dim above 256 or no multiple of 8."""
        if q.shape[2] % 8 or q.shape[2] > 256:
            raise ValueError(
                f"--kv-channels {q.shape[2]}: cuDNN's attention needs a multiple of 8 that is at most 256; "
                "--attention-backend flash has the same limit"
            )
        if min(len(q), len(k)) == 1:
            return _INSTEAD.forward(q, k, v, causal, scale)
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention.default(
            heads_first(q),
            heads_first(k),
            heads_first(v),
            None,  # no bias
            True,  # return the log-sum-exp
            NO_DROPOUT,
            causal,
            False,  # no debug mask
            scale=scale,
        )
        return tokens_first(out), lse[0, :, :, 0]

    def backward(
        self,
        grad_out: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        causal: bool,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `AttentionKernel.backward`; copies ``grad_out`` and ``lse`` where they are not contiguous."""
        if min(len(q), len(k)) == 1:
            return _INSTEAD.backward(grad_out, q, k, v, out, lse, causal, scale)
        half = KEY_BLOCK // 2
        if causal or len(k) % KEY_BLOCK != half:
            return _backward(grad_out, q, k, v, out, lse, causal, scale)
        dq, dk, dv = _INSTEAD.backward(grad_out, q, k[-half:], v[-half:], out, lse, False, scale)
        if len(k) == half:
            return dq, dk, dv
        # Weights follow from the log-sum-exps of all keys, so the shares of both parts add up.
        first_dq, first_dk, first_dv = _backward(grad_out, q, k[:-half], v[:-half], out, lse, False, scale)
        return first_dq.add_(dq), torch.cat((first_dk, dk)), torch.cat((first_dv, dv))


def _backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    no_random_state = torch.zeros((), dtype=torch.int64, device=q.device)  # read with dropout only
    dq, dk, dv = aten._scaled_dot_product_cudnn_attention_backward.default(
        heads_first(grad_out.contiguous()),
        heads_first(q),
        heads_first(k),
        heads_first(v),
        heads_first(out),
        lse.contiguous()[None, :, :, None],  # its plan takes them for contiguous
        no_random_state,
        no_random_state,
        None,  # no bias
        None,  # no cumulative lengths: one dense sequence
        None,
        q.shape[0],
        k.shape[0],
        NO_DROPOUT,
        causal,
        scale=scale,
    )
    return tokens_first(dq), tokens_first(dk), tokens_first(dv)
