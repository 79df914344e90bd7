"""cuDNN's attention, the faster one on Hopper and Blackwell, behind the interface of the other kernels."""

# Tq=queries Tk=keys N=query heads G=key/value heads D=head_dim

from __future__ import annotations

import torch

from megatron_longpo.attention.blocks import are_blocks, in_blocks
from megatron_longpo.attention.grouped import FoldedRectangles
from megatron_longpo.attention.kernels import (
    NO_DROPOUT,
    AttentionKernel,
    CudaFlashKernel,
    aten,
    heads_first,
    require_head_dim,
    tokens_first,
)
from megatron_longpo.attention.tiles import Plan


class CudnnKernel(AttentionKernel):
    """cuDNN on CUDA: bf16 and fp16, grouped queries natively, any strides but the last.

    Its log-sum-exps are natural logarithms, one per query and head, and its backward pass takes them and the output as
    arguments: torch's own ring attention merges them across ranks by the same rule
    (``torch.distributed.tensor.experimental``).

    cuDNN computes tiles of whole blocks, FlashAttention all others: what is left over of large tiles, and small ones.

    - For every new shape torch makes a plan, on the host, and keeps it for ever (``MHAGraphCache``,
      pytorch/pytorch#190388). Documents of thousands of lengths would make tens of thousands of plans.
    - cuDNN's faults are in blocks that are not whole. It refuses one query on one key. Before 9.15.1 its backward pass
      may leave its tensors (pytorch/pytorch#169849). Later, too, it gives NaN where a log-sum-exp is below -88.7, from
      where exp(-lse) is infinite: in dq if keys are 64 more than a multiple of 128 (pytorch/pytorch#196678), in dk and
      dv of a single query (NVIDIA/cudnn-frontend#1072). Real models have such log-sum-exps (huggingface/trl#7181).

    Args:
        block_tokens: A multiple of 128. What is left over is half of it on average: of documents of 60K to 130K tokens
            0.6 % of attention on one rank, 4 % on 8 context-parallel ones.
        smallest_tokens: Tiles with a shorter side are small.
    """

    def __init__(self, block_tokens: int = 256, smallest_tokens: int = 512) -> None:
        self.blocks = block_tokens, smallest_tokens
        self._others = FoldedRectangles(CudaFlashKernel())

    def cut(self, tiles: Plan) -> Plan:
        """The plan with whole blocks in tiles of their own."""
        return in_blocks(tiles, *self.blocks)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `AttentionKernel.forward`, in bf16 or fp16; ValueError for a head_dim above 256 or no multiple of 8."""
        if not are_blocks(len(q), len(k), *self.blocks):
            return self._others.forward(q, k, v, causal, scale)
        require_head_dim(q)
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
        if not are_blocks(len(q), len(k), *self.blocks):
            return self._others.backward(grad_out, q, k, v, out, lse, causal, scale)
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
