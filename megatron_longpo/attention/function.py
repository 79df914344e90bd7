"""Attention as ONE autograd function, whatever the way to compute it.

However ranks share a row, what is saved is this rank's queries, keys and values, the output and the log-sum-exps; the
gradients are computed from these. How, says a `RowAttention`: a frozen description with plain functions of tensors.

Communication that the backward pass begins with is started before its gradient is there, behind what is computed until
then. Backward passes come in the reverse order of the layers, so each starts that of the layer in front (`follow`). If
layers are recomputed, the keys of the layer in front do not exist then; the last layer of a group starts its own as
soon as its keys are there again, unless its forward pass communicates once more anyway.
"""

# t=tokens of this rank N=query heads G=key/value heads D=head_dim

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakIdKeyDictionary

from megatron_longpo.attention.kept import Result, backward_follows, computed_once
from megatron_longpo.attention.kernels import AttentionKernel
from megatron_longpo.attention.selection import select_kernel
from megatron_longpo.config.training import FLASH
from megatron_longpo.data.layout import RowLayout

Saved = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""q, k, v, output and log-sum-exps, as `RowAttention.forward` got and returned them."""
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Of q, k and v."""


@dataclass(frozen=True)
class RowAttention(ABC):
    """How the ranks that share a row compute its attention.

    Args:
        layout: The whole row.
        scale: Factor on the scores.
        backend: The kernel, a value of ``--attention-backend``.
    """

    layout: RowLayout
    scale: float
    backend: str = field(default=FLASH, kw_only=True)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attention of this rank's queries on the whole row, differentiable.

        Collectives: those of `forward` and `backward`. Recomputed with its results kept (`kept.KeptResults`) it
        communicates nothing.

        Args:
            q: ``[t, N, D]``.
            k: ``[t, G, D]``.
            v: ``[t, G, D]``.

        Returns:
            ``[t, N, D]``.
        """
        return _Function.apply(self, q, k, v)

    def kernel(self, like: torch.Tensor) -> AttentionKernel:
        """The kernel for tensors of this kind."""
        return select_kernel(like.device, like.dtype, self.backend)

    @abstractmethod
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Result:
        """Output ``[t, N, D]`` and log-sum-exps ``[N, t]``, these in fp32 (fp64 for fp64), of contiguous tensors."""

    @abstractmethod
    def backward(self, grad_out: torch.Tensor, saved: Saved, started: Any) -> Gradients:
        """dq ``[t, N, D]``, dk and dv ``[t, G, D]``, the last two in k's dtype or a wider one.

        ``started`` is what `start_backward` returned if it was called, else None.
        """

    def start_backward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        """Start the communication that `backward` begins with; None if there is none without the gradient."""
        return None


class _Function(torch.autograd.Function):
    """Saves q, k, v, out and the log-sum-exps; no score matrix, no partial result, no key of another rank."""

    @staticmethod
    def forward(ctx: Any, attention: RowAttention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Output ``[t, N, D]``; starts the communication of the backward pass if that follows at once."""
        q, k, v = _compact(q), _compact(k), _compact(v)
        out, lse = computed_once(lambda: attention.forward(q, k, v))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.attention = attention
        ctx.in_front, ctx.was_differentiated = None, False
        ctx.started = attention.start_backward(q, k, v) if backward_follows() else None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """dq, dk and dv in the dtypes of q, k and v; starts the communication of the layer in front meanwhile."""
        q, k, v, out, lse = ctx.saved_tensors
        started, ctx.started = ctx.started, None
        dq, dk, dv = ctx.attention.backward(grad_out, (q, k, v, out, lse), started)
        node, ctx.in_front, ctx.was_differentiated = ctx.in_front, None, True
        if node is not None and not node.was_differentiated:
            node.started = node.attention.start_backward(*node.saved_tensors[:3])
        return None, dq, dk.to(k.dtype), dv.to(v.dtype)


_last_on_row = WeakIdKeyDictionary()
"""The autograd node of the last attention on a row. Weak on both sides: a graph lives no longer for it."""


def follow(row: torch.Tensor, out: torch.Tensor) -> None:
    """Let the backward pass of an attention start that of the attention in front of it.

    Args:
        row: A tensor that all layers of a forward pass get, and preferably no other pass: it identifies the pass.
        out: What `RowAttention.__call__` returned for the layer that computes now; other tensors are passed over.
    """
    node: Any = out.grad_fn
    if not isinstance(getattr(node, "attention", None), RowAttention):
        return
    if row in _last_on_row:
        node.in_front = _last_on_row[row]()
    _last_on_row[row] = weakref.ref(node)


def _compact(x: torch.Tensor) -> torch.Tensor:
    """x in storage of its own, copied only if it is a view of something larger.

    Saved for backward, a view of the fused query-key-value projection would keep all of that projection alive.
    """
    alone = x.is_contiguous() and x.untyped_storage().nbytes() == x.nbytes
    return x if alone else x.clone(memory_format=torch.contiguous_format)


def check_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_tokens: int) -> None:
    """Raise a ValueError unless q is ``[num_tokens, N, D]``, k and v ``[num_tokens, G, D]`` and N a multiple of G."""
    if not len(q) == len(k) == len(v) == num_tokens:
        raise ValueError(
            f"attention got {len(q)} queries, {len(k)} keys and {len(v)} values for a layout of {num_tokens} tokens: "
            "build the row and its RowLayout with the same context-parallel size and row_multiple"
        )
    if k.shape != v.shape or q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"attention needs k and v of one shape and query heads in a multiple of theirs, got q {tuple(q.shape)}, "
            f"k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
