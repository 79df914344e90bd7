"""The attention kernels behind one small interface: attention that also returns its log-sum-exp, and its backward.

All tensors are rows, tokens first, one batch: q ``[Tq, N, D]``, k and v ``[Tk, M, D]`` with M dividing N (grouped-query
attention), out ``[Tq, N, D]``, lse ``[Tq, N]``. Strides are free but for the last dimension.
"""

# Tq,Tk=query and key tokens N=query heads M=key/value heads D=head_dim

from __future__ import annotations

from typing import Protocol

import torch

aten = torch.ops.aten
Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class AttentionKernel(Protocol):
    """Attention over one tile: causal (square) or full (any shape)."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns out in the input's dtype and lse in fp32 (fp64 for fp64)."""
        ...

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
    ) -> Triple:
        """Returns this tile's share of (grad_q, grad_k, grad_v).

        ``out`` and ``lse`` are those of the queries over ALL their tiles: with them exp(q·k − lse) is the probability
        in the whole softmax, so that shares of different tiles add up to the gradient.
        """
        ...


def select_kernel(device: torch.device, dtype: torch.dtype) -> AttentionKernel:
    """The kernel for a device and dtype.

    Raises:
        ValueError: There is none.
    """
    if device.type == "cpu":
        return CpuFlash()
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        return CudaFlash()
    if device.type == "cuda" and dtype == torch.float32:
        return CudaEfficient()
    raise ValueError(f"no attention kernel for {dtype} on {device.type}: use --bf16, or fp32")


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """[T, N, D] as [1, N, T, D], or lse [T, N] as [1, N, T]; a view."""
    return x.transpose(0, 1)[None]


def _tokens_first(x: torch.Tensor) -> torch.Tensor:
    return x[0].transpose(0, 1)


class CpuFlash:
    """torch's flash attention for the CPU: fp64, fp32, bf16, grouped-query heads natively both ways."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `AttentionKernel.forward`."""
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            _heads_first(q), _heads_first(k), _heads_first(v), 0.0, causal, scale=scale
        )
        return _tokens_first(out), _tokens_first(lse)

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
    ) -> Triple:
        """See `AttentionKernel.backward`."""
        rows = [_heads_first(x) for x in (grad_out, q, k, v, out, lse)]
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(*rows, 0.0, causal, scale=scale)
        return tuple(_tokens_first(grad) for grad in grads)  # type: ignore[return-value]


class CudaFlash:
    """torch's FlashAttention-2 for CUDA: bf16 and fp16, grouped-query heads natively, layout [1, T, N, D]."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `AttentionKernel.forward`."""
        out, lse, *_ = aten._flash_attention_forward(
            q[None], k[None], v[None], None, None, len(q), len(k), 0.0, causal, False, scale=scale
        )
        return out[0], lse[0].transpose(0, 1)

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
    ) -> Triple:
        """See `AttentionKernel.backward`."""
        # The random state is read by dropout alone, which is off.
        unused = torch.empty(2, dtype=torch.uint64, device=q.device)
        grads = aten._flash_attention_backward(
            grad_out[None].contiguous(),
            q[None],
            k[None],
            v[None],
            out[None],
            _heads_first(lse).contiguous(),
            None,
            None,
            len(q),
            len(k),
            0.0,
            causal,
            unused,
            unused,
            scale=scale,
        )
        return tuple(grad[0] for grad in grads)  # type: ignore[return-value]


class CudaEfficient:
    """torch's memory-efficient attention for CUDA, for fp32; it has no grouped-query heads, so keys are expanded."""

    _LSE_ALIGNMENT = 32

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `AttentionKernel.forward`."""
        k, v = self._expand(k, q), self._expand(v, q)
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(
            _heads_first(q), _heads_first(k), _heads_first(v), None, True, 0.0, causal, scale=scale
        )
        return _tokens_first(out), _tokens_first(lse)[: len(q)]

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
    ) -> Triple:
        """See `AttentionKernel.backward`."""
        groups = k.shape[1]
        keys, values = self._expand(k, q), self._expand(v, q)
        # The kernel reads whole blocks of the log-sum-exp; +inf gives the rows behind the end probability 0.
        padding = -len(lse) % self._LSE_ALIGNMENT
        padded = torch.nn.functional.pad(lse.float(), (0, 0, 0, padding), value=torch.inf)
        zero = torch.zeros((), dtype=torch.int64, device=q.device)
        grad_q, grad_k, grad_v, _ = aten._scaled_dot_product_efficient_attention_backward(
            _heads_first(grad_out),
            _heads_first(q),
            _heads_first(keys),
            _heads_first(values),
            None,
            _heads_first(out),
            _heads_first(padded).contiguous(),
            zero,
            zero,
            0.0,
            [True, True, True, False],
            causal,
            scale=scale,
        )
        return (
            _tokens_first(grad_q),
            self._sum_groups(_tokens_first(grad_k), groups),
            self._sum_groups(_tokens_first(grad_v), groups),
        )

    @staticmethod
    def _expand(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)

    @staticmethod
    def _sum_groups(grad: torch.Tensor, groups: int) -> torch.Tensor:
        return grad.unflatten(1, (groups, -1)).sum(dim=2)
