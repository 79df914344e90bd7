"""The attention kernels of torch behind one interface: causal squares and full rectangles that return log-sum-exps.

Each kernel takes views of row tensors, tokens first, so callers slice rows and copy nothing. Grouped queries: the N
query heads come in G groups of N / G neighbours, and each group shares one of the G key/value heads.
"""

# Tq=queries Tk=keys N=query heads G=key/value heads D=head_dim

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from packaging.version import Version

from megatron_longpo.attention.tiles import Plan

aten = torch.ops.aten

NO_DROPOUT = 0.0

COUNTS_IN_INT32 = Version(torch.__version__) < Version("2.11")
"""Whether torch's FlashAttention computes addresses in its backward pass in 32 bits."""


class AttentionKernel(ABC):
    """One kernel with its backward.

    A causal call is square, Tq == Tk. The backward takes the output and log-sum-exp of the WHOLE attention of its
    queries, over all of their keys, of which this call may be a part: its weights ``exp(score - lse)`` and its
    ``rowsum(grad_out * out)`` are then those of the whole softmax, so gradients of parts just add up.
    """

    def cut(self, tiles: Plan) -> Plan:
        """A plan of the same attention, in tiles that suit the kernel."""
        return tiles

    @abstractmethod
    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of q on k and v.

        Args:
            q: ``[Tq, N, D]``, last dimension contiguous, other strides free.
            k: ``[Tk, G, D]``, likewise.
            v: ``[Tk, G, D]``, likewise.
            causal: Query i sees keys 0..i.
            scale: Factor on the scores.

        Returns:
            Output ``[Tq, N, D]`` in q's dtype; log-sum-exp of the scaled scores ``[N, Tq]`` in fp32 (fp64 for fp64).
        """

    @abstractmethod
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
        """This call's share of the gradients of q ``[Tq, N, D]``, k and v ``[Tk, G, D]``; ``lse`` is ``[N, Tq]``."""


class CpuFlashKernel(AttentionKernel):
    """torch's CPU flash attention: fp64, fp32, bf16, fp16; grouped queries natively; any strides.

    Its causal mask is anchored top left, which on a square is the only one there is.
    """

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `AttentionKernel.forward`, on views: nothing is copied."""
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu.default(
            heads_first(q), heads_first(k), heads_first(v), NO_DROPOUT, causal, scale=scale
        )
        return tokens_first(out), lse[0]

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
        """As `AttentionKernel.backward`, on views: nothing is copied."""
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward.default(
            heads_first(grad_out),
            heads_first(q),
            heads_first(k),
            heads_first(v),
            heads_first(out),
            lse.unsqueeze(0),
            NO_DROPOUT,
            causal,
            scale=scale,
        )
        return tokens_first(dq), tokens_first(dk), tokens_first(dv)


class CudaFlashKernel(AttentionKernel):
    """torch's FlashAttention on CUDA: bf16 and fp16, ``[batch, tokens, heads, head_dim]``, grouped queries natively.

    Deterministic if ``torch.use_deterministic_algorithms`` is on.
    """

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `AttentionKernel.forward`, in bf16 or fp16; ValueError for a head_dim above 256 or no multiple of 8."""
        require_head_dim(q)
        out, lse, *_ = aten._flash_attention_forward.default(
            q.unsqueeze(0),
            k.unsqueeze(0),
            v.unsqueeze(0),
            None,  # no cumulative lengths: one dense sequence
            None,
            q.shape[0],
            k.shape[0],
            NO_DROPOUT,
            causal,
            False,  # no debug mask
            scale=scale,
        )
        return out[0], lse[0]

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
        """As `AttentionKernel.backward`; copies ``lse`` where it is not contiguous.

        Before torch 2.11 a ValueError for more than 2^31 elements of queries (Dao-AILab/flash-attention#1500).
        """
        if COUNTS_IN_INT32 and q.numel() > 2**31:
            raise ValueError(
                f"{q.shape[0]} tokens with {q.shape[1]} heads of {q.shape[2]} on a GPU are too many for FlashAttention "
                f"in torch {torch.__version__}, which counts them in 32 bits: update torch to 2.11, or raise "
                "--tensor-model-parallel-size or --context-parallel-size"
            )
        no_random_state = torch.empty(2, dtype=torch.uint64, device=q.device)  # read with dropout only
        dq, dk, dv = aten._flash_attention_backward.default(
            grad_out.unsqueeze(0),
            q.unsqueeze(0),
            k.unsqueeze(0),
            v.unsqueeze(0),
            out.unsqueeze(0),
            lse.contiguous().unsqueeze(0),  # the kernel reads it by address and ignores strides
            None,
            None,
            q.shape[0],
            k.shape[0],
            NO_DROPOUT,
            causal,
            no_random_state,
            no_random_state,
            scale=scale,
        )
        return dq[0], dk[0], dv[0]


class CudaEfficientKernel(AttentionKernel):
    """torch's memory-efficient attention on CUDA, for fp32: it has no grouped queries, so key/value heads are repeated.

    fp32 on a GPU serves parity tests; training runs in bf16.
    """

    LSE_MULTIPLE = 32
    """The kernel reads log-sum-exps in aligned blocks, of which the last one is padded."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `AttentionKernel.forward`, with k and v repeated to ``[Tk, N, D]``."""
        out, lse, *_ = aten._scaled_dot_product_efficient_attention.default(
            heads_first(q),
            heads_first(_repeat_heads(k, q)),
            heads_first(_repeat_heads(v, q)),
            None,  # no bias
            True,  # return the log-sum-exp
            NO_DROPOUT,
            causal,
            scale=scale,
        )
        return tokens_first(out), lse[0, :, : q.shape[0]]

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
        """As `AttentionKernel.backward`; gradients of repeated heads are summed to ``[Tk, G, D]``."""
        # A weight exp(score - inf) is 0, so padding adds nothing.
        padded_lse = torch.nn.functional.pad(lse, (0, -q.shape[0] % self.LSE_MULTIPLE), value=torch.inf)
        no_random_state = torch.zeros((), dtype=torch.int64, device=q.device)  # read with dropout only
        dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward.default(
            heads_first(grad_out),
            heads_first(q),
            heads_first(_repeat_heads(k, q)),
            heads_first(_repeat_heads(v, q)),
            None,
            heads_first(out.contiguous()),  # its row stride is taken for N * D
            padded_lse.contiguous().unsqueeze(0),
            no_random_state,
            no_random_state,
            NO_DROPOUT,
            [True, True, True, False],  # gradients of q, k and v; none of the bias
            causal,
            scale=scale,
        )
        return tokens_first(dq), _sum_heads(tokens_first(dk), k), _sum_heads(tokens_first(dv), v)


def require_head_dim(q: torch.Tensor) -> None:
    """Raise a ValueError unless the kernels for half precision on CUDA compute heads as long as those of ``q``."""
    if q.shape[2] % 8 or q.shape[2] > 256:
        raise ValueError(f"--kv-channels {q.shape[2]}: attention on CUDA needs a multiple of 8 that is at most 256")


def heads_first(x: torch.Tensor) -> torch.Tensor:
    """``[T, N, D]`` as ``[1, N, T, D]``, a view."""
    return x.transpose(0, 1).unsqueeze(0)


def tokens_first(x: torch.Tensor) -> torch.Tensor:
    """``[1, N, T, D]`` as ``[T, N, D]``, a view."""
    return x.squeeze(0).transpose(0, 1)


def _repeat_heads(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """``[Tk, G, D]`` to ``[Tk, N, D]``."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _sum_heads(grad: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Gradient ``[Tk, N, D]`` of repeated heads to that of the heads themselves, ``[Tk, G, D]``."""
    return grad.unflatten(1, (like.shape[1], -1)).sum(2)
