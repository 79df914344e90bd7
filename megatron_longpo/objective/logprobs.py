"""Token log-probs from hidden states without the logits of a whole row: token-chunked, vocab-parallel, recomputed.

At 512K tokens and a vocabulary of 152K the logits of one row are 319 GB in fp32. Here only one chunk of them exists at
a time; the backward pass computes each chunk again, one more matrix product in exchange for all of that memory.
"""

# T=tokens of the row K=predictions C=predictions of a chunk H=hidden_size V=vocabulary rows of this rank

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    source_index: torch.Tensor,
    targets: torch.Tensor,
    *,
    vocab_size: int | None = None,
    chunk_tokens: int = 1024,
    tp_group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """log softmax(hidden[source] · weightᵀ)[target] of every prediction.

    Collectives: 2 tensor-parallel all-reduces forward (max of ``[K]``, sum of ``[2, K]``), 0 backward: under tensor
    parallelism the caller passes ``hidden`` through Megatron's ``copy_to_tensor_model_parallel_region`` (or the
    gather of sequence parallelism), whose backward sums the gradient over ranks.

    Args:
        hidden: ``[T, H]``, the row after the final norm; the whole row on every tensor-parallel rank.
        weight: ``[V, H]``, this rank's rows of the vocabulary: rank r holds rows r·V to (r+1)·V.
        source_index: int64 ``[K]``, the row of ``hidden`` that makes each prediction; may repeat.
        targets: int64 ``[K]``, token ids over the whole vocabulary.
        vocab_size: True size of the vocabulary; the padding rows behind it get no probability.
        chunk_tokens: Predictions whose logits exist at one time.
        tp_group: Ranks that share the vocabulary; None for one rank.

    Returns:
        fp32 ``[K]`` (fp64 for fp64 input).
    """
    if tp_group is not None and tp_group.size() == 1:
        tp_group = None
    return _LinearLogprobs.apply(hidden, weight, source_index, targets, vocab_size, chunk_tokens, tp_group)


class _LinearLogprobs(torch.autograd.Function):
    """Forward keeps the log-sum-exp of every prediction, so that backward needs one pass and no collective."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        source_index: torch.Tensor,
        targets: torch.Tensor,
        vocab_size: int | None,
        chunk_tokens: int,
        tp_group: dist.ProcessGroup | None,
    ) -> torch.Tensor:
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        first = 0 if tp_group is None else tp_group.rank() * len(weight)
        own_rows = len(weight) if vocab_size is None else min(len(weight), max(0, vocab_size - first))
        ctx.own_rows, ctx.first, ctx.chunk_tokens = own_rows, first, chunk_tokens

        num_predictions = len(targets)
        largest = torch.full((num_predictions,), -torch.inf, dtype=dtype, device=hidden.device)
        sums = torch.zeros((2, num_predictions), dtype=dtype, device=hidden.device)  # Σ exp, target's logit
        for part in _chunks(num_predictions, chunk_tokens):
            if own_rows == 0:
                break
            logits = _logits(hidden, weight, source_index[part], own_rows, dtype)
            column, is_own = _own_columns(targets[part], first, own_rows)
            sums[1, part] = logits.gather(1, column).squeeze(1) * is_own
            largest[part] = logits.amax(dim=1)
            sums[0, part] = logits.sub_(largest[part, None]).exp_().sum(dim=1)
        if tp_group is not None:
            shard_largest = largest.clone()
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=tp_group)
            sums[0] *= (shard_largest - largest).exp()
            dist.all_reduce(sums, group=tp_group)
        log_sum_exp = largest + sums[0].log()
        ctx.save_for_backward(hidden, weight, source_index, targets, log_sum_exp)
        return sums[1] - log_sum_exp

    @staticmethod
    def backward(ctx: Any, grad_logps: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, source_index, targets, log_sum_exp = ctx.saved_tensors
        dtype = log_sum_exp.dtype
        grad_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        # Many chunks add up here: in bf16 the sum would lose what later chunks bring.
        grad_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if ctx.needs_input_grad[1] else None
        for part in _chunks(len(targets), ctx.chunk_tokens):
            if ctx.own_rows == 0:
                break
            source, scale = source_index[part], grad_logps[part, None].to(dtype)
            logits = _logits(hidden, weight, source, ctx.own_rows, dtype)
            # d logp / d logits = onehot(target) - softmax
            grad_logits = logits.sub_(log_sum_exp[part, None]).exp_().mul_(-scale)
            column, is_own = _own_columns(targets[part], ctx.first, ctx.own_rows)
            grad_logits.scatter_add_(1, column, scale * is_own[:, None])
            grad_logits = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden.index_add_(0, source, grad_logits @ weight[: ctx.own_rows])
            if grad_weight is not None:
                rows = grad_weight[: ctx.own_rows]
                if rows.dtype == hidden.dtype:
                    rows.addmm_(grad_logits.T, hidden[source])
                else:
                    rows += grad_logits.T @ hidden[source]
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), *[None] * 5


def _chunks(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _logits(
    hidden: torch.Tensor, weight: torch.Tensor, source: torch.Tensor, own_rows: int, dtype: torch.dtype
) -> torch.Tensor:
    """Logits of one chunk over this rank's true vocabulary rows: ``[C, own_rows]``, fresh memory."""
    return (hidden[source] @ weight[:own_rows].T).to(dtype)


def _own_columns(targets: torch.Tensor, first: int, own_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The targets as columns of this rank ``[C, 1]``, clamped, and which of them truly are this rank's ``[C]``."""
    column = targets - first
    is_own = (column >= 0) & (column < own_rows)
    return column.clamp(0, own_rows - 1)[:, None], is_own
