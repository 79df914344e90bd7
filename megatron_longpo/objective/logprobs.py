"""Log-probs of chosen next tokens from hidden states, without ever holding the logits of a whole row.

The logits of 512K tokens over a vocabulary of 152K take 319 GB in fp32. Here they exist for ``chunk_tokens``
predictions at a time, in one buffer that every chunk reuses, and backward computes them again: one more matrix product
on top of the three that a linear layer costs. The vocabulary may be split over tensor-parallel ranks, and so may the
row, whose hidden states are then exchanged for one chunk at a time.
"""

# T=tokens of the row H=hidden_size V=vocabulary rows of this rank K=predictions c=predictions of one chunk

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megatron_longpo.gpu_kernels import has_kernels


def linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    source_index: torch.Tensor,
    targets: torch.Tensor,
    *,
    vocab_size: int,
    chunk_tokens: int = 1024,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
) -> torch.Tensor:
    """``log softmax(hidden[source_index] @ weight.T)[targets]``, computed chunk by chunk.

    Logits are fp32 whatever the weights are: a preference is a small difference of large sums of log-probs, which
    logits rounded to bf16 would drown. Nothing here waits for the device.

    Collectives: 2 TP all-reduces forward for the whole row (MAX of ``[K]``, SUM of ``[2, K]``), 0 backward. With
    ``sequence_parallel`` also one per chunk forward, of its hidden states ``[c, H]``, and two backward, of these and of
    their gradients, behind the matrix products.

    Args:
        hidden: ``[T, H]``; multiplied in the dtype of the weight. Its gradient is this rank's part of a sum over TP:
            the caller takes it from Megatron's ``copy_to_tensor_model_parallel_region``, which adds it up. With
            ``sequence_parallel``: ``[T / tp, H]``, this rank's tokens, and the gradient is the sum.
        weight: ``[V, H]``, this rank's rows of the LM head, fp64, fp32, bf16 or fp16. Its gradient is summed in fp32.
        source_index: int64 ``[K]``, the row of ``hidden`` that makes each prediction. It may repeat: the last token of
            a prefix predicts the first token of every branch.
        targets: int64 ``[K]``, token ids of the whole vocabulary. One outside of it has log-prob -inf.
        vocab_size: The true vocabulary over all ranks; rows of the weight beyond it are padding and get no
            probability.
        chunk_tokens: Predictions whose logits exist at one time.
        tp_group: The ranks that the vocabulary is split over, in rank order. None or one rank: not split.
        sequence_parallel: The row is split over the same ranks.

    Returns:
        ``[K]``, fp32 (fp64 for fp64), the same on every rank of ``tp_group``.
    """
    assert tp_group is not None or not sequence_parallel
    assert hidden.dim() == 2 and weight.dim() == 2 and hidden.shape[1] == weight.shape[1], (hidden.shape, weight.shape)
    assert source_index.shape == targets.shape and targets.dim() == 1, (source_index.shape, targets.shape)
    assert chunk_tokens > 0, chunk_tokens
    tokens = _Tokens(len(hidden), tp_group if sequence_parallel else None)
    return _LinearLogprobs.apply(hidden, weight, source_index, targets, vocab_size, chunk_tokens, tp_group, tokens)


@dataclass(frozen=True)
class _Shard:
    """Which columns of the vocabulary this rank's logits are."""

    start: int  # global token id of column 0
    num_tokens: int  # columns that are tokens; those behind them are padding
    vocab_size: int  # tokens over all ranks

    @staticmethod
    def of(weight: torch.Tensor, vocab_size: int, group: dist.ProcessGroup | None) -> _Shard:
        """The shard that a rank's ``weight [V, H]`` is; without a group it is the whole vocabulary."""
        columns = weight.shape[0]
        rank, size = (group.rank(), group.size()) if group is not None else (0, 1)
        assert vocab_size <= columns * size, (vocab_size, weight.shape, size)
        return _Shard(rank * columns, min(max(vocab_size - rank * columns, 0), columns), vocab_size)

    def find(self, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Columns of the targets, int64 ``[c, 1]``, and whether they are here at all, bool ``[c, 1]``."""
        column = (targets - self.start)[:, None]
        here = (column >= 0) & (column < self.num_tokens)
        return column.masked_fill(~here, 0), here


@dataclass(frozen=True)
class _Tokens:
    """Which tokens of a row have their hidden states on this rank: all of them, or those of one rank of a group."""

    num_tokens: int
    group: dist.ProcessGroup | None

    def chunks(
        self, hidden: torch.Tensor, source_index: torch.Tensor, chunk_tokens: int
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """The states ``[c, H]`` of one chunk of predictions after another; those of the next are on their way."""
        total = len(source_index)
        rows = [slice(start, min(start + chunk_tokens, total)) for start in range(0, total, chunk_tokens)]
        ahead = self._fetch(hidden, source_index[rows[0]]) if rows else None
        for number, chunk in enumerate(rows):
            assert ahead is not None
            states, under_way = ahead
            if number + 1 < len(rows):
                ahead = self._fetch(hidden, source_index[rows[number + 1]])
            if under_way is not None:
                under_way.wait()
            yield chunk, states

    def _fetch(self, hidden: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, dist.Work | None]:
        if self.group is None:
            return hidden.index_select(0, index), None
        place, elsewhere = self._find(index)
        # One rank has a state, the others add zeros.
        states = hidden.index_select(0, place).masked_fill_(elsewhere, 0.0)
        return states, dist.all_reduce(states, group=self.group, async_op=True)

    def begin_sum(self, states: torch.Tensor) -> dist.Work | None:
        """Start to add up the ranks' parts of a gradient of states, in place."""
        return None if self.group is None else dist.all_reduce(states, group=self.group, async_op=True)

    def add_(self, total: torch.Tensor, index: torch.Tensor, states: torch.Tensor) -> None:
        """Add states to those of the tokens that are here."""
        if self.group is not None:
            index, elsewhere = self._find(index)
            states = states.masked_fill(elsewhere, 0.0)
        total.index_add_(0, index, states)

    def _find(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the tokens are in this rank's, int64 ``[c]``, and whether they are not, bool ``[c, 1]``."""
        assert self.group is not None
        place = index - self.group.rank() * self.num_tokens
        elsewhere = (place < 0) | (place >= self.num_tokens)
        return place.masked_fill(elsewhere, 0), elsewhere[:, None]


@dataclass
class _Chunk:
    """The logits of a few predictions. They lie in a buffer that the next chunk overwrites; work on them in place."""

    rows: slice  # which of the K predictions
    hidden: torch.Tensor  # [c, H], the states that predict
    logits: torch.Tensor  # [c, V], fp32 (fp64 for fp64); -inf in the padding columns


def _chunks(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    source_index: torch.Tensor,
    chunk_tokens: int,
    tokens: _Tokens,
    shard: _Shard,
) -> Iterator[_Chunk]:
    """Logits of one chunk of predictions after another; forward and backward see the same ones, bit by bit."""
    # Fresh memory costs page faults (CPU) or fragmentation (CUDA) for every chunk: one buffer serves them all.
    buffer = weight.new_empty(min(chunk_tokens, len(source_index)), weight.shape[0], dtype=_wide(weight.dtype))
    for rows, states in tokens.chunks(hidden, source_index, chunk_tokens):
        states = states.to(weight.dtype)
        logits = _product(states, weight.t(), out=buffer[: len(states)])
        logits[:, shard.num_tokens :] = -torch.inf
        yield _Chunk(rows, states, logits)


class _LinearLogprobs(torch.autograd.Function):
    """Forward keeps one number per prediction, the log of its partition sum; backward recomputes the logits from it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        source_index: torch.Tensor,
        targets: torch.Tensor,
        vocab_size: int,
        chunk_tokens: int,
        group: dist.ProcessGroup | None,
        tokens: _Tokens,
    ) -> torch.Tensor:
        """Log-probs ``[K]``, chunk by chunk; 2 TP all-reduces of ``[K]`` and ``[2, K]`` at the end."""
        shard = _Shard.of(weight, vocab_size, group)
        # Row 0 becomes the log of the sum of exponentials, row 1 the target's logit.
        stats = weight.new_empty(2, len(targets), dtype=_wide(weight.dtype))
        for chunk in _chunks(hidden, _operand(weight), source_index, chunk_tokens, tokens, shard):
            column, here = shard.find(targets[chunk.rows])
            stats[1, chunk.rows] = chunk.logits.gather(1, column).masked_fill_(~here, 0.0)[:, 0]
            stats[0, chunk.rows] = _logsumexp(chunk.logits)
        if group is not None and group.size() > 1 and len(targets):
            _combine_(stats, group)
        log_total, target_logit = stats
        ctx.save_for_backward(hidden, weight, source_index, targets, log_total)
        ctx.tokens, ctx.shard, ctx.chunk_tokens = tokens, shard, chunk_tokens
        outside = (targets < 0) | (targets >= shard.vocab_size)
        return (target_logit - log_total).masked_fill_(outside, -torch.inf)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: torch.Tensor) -> tuple[Any, ...]:
        """Gradients of hidden ``[T, H]`` and weight ``[V, H]``, of ``grad_logps [K]``; see `linear_logprobs`."""
        hidden, weight, source_index, targets, log_total = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        multiplied = _operand(weight)
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        sum_weight = _ProductSum(weight) if needs_weight else None
        scratch = summing = None
        for chunk in _chunks(hidden, multiplied, source_index, ctx.chunk_tokens, ctx.tokens, ctx.shard):
            rows = chunk.rows
            # d logp / d logits = onehot - p. This is its negative; sign and incoming gradient go into the factors
            # [c, H] below, V / H times smaller than the logits.
            column, here = ctx.shard.find(targets[rows])
            if scratch is None and multiplied.dtype != chunk.logits.dtype:
                # Tensor cores multiply operands of one half-precision type.
                scratch = torch.empty_like(chunk.logits, dtype=multiplied.dtype)
            out = chunk.logits if scratch is None else scratch[: len(chunk.logits)]
            error = _softmax_error(chunk.logits, log_total[rows], column, here, out)
            scale = -grad_logps[rows, None]
            if grad_hidden is not None:
                product = _product(error, multiplied).mul_(scale).to(grad_hidden.dtype)
                summing = ctx.tokens.begin_sum(product)
            if sum_weight is not None:
                sum_weight.add(error.t(), (chunk.hidden * scale).to(error.dtype))
            if grad_hidden is not None:
                if summing is not None:
                    summing.wait()
                ctx.tokens.add_(grad_hidden, source_index[rows], product)
        return grad_hidden, None if sum_weight is None else sum_weight.total.to(weight.dtype), *(None,) * 6


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, log-probs and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _operand(weight: torch.Tensor) -> torch.Tensor:
    """The weight as matrix products take it: only CUDA multiplies half precision into fp32, others take fp32."""
    return weight if weight.is_cuda else weight.to(_wide(weight.dtype))


def _product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """``a @ b`` in fp32 (fp64 for fp64); half-precision factors are accumulated and returned in fp32."""
    if a.dtype == _wide(a.dtype):
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


class _ProductSum:
    """A sum of matrix products of the weight's shape, in fp32 (fp64 for fp64): its gradient over all chunks."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.total = torch.zeros_like(weight, dtype=_wide(weight.dtype), memory_format=torch.contiguous_format)
        self.scratch: torch.Tensor | None = None

    def add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Add ``a @ b``, ``[V, c] @ [c, H]``."""
        if a.dtype == self.total.dtype:
            self.total.addmm_(a, b)
            return
        # torch.addmm with out_dtype takes an fp32 summand only in the newest versions.
        self.scratch = torch.empty_like(self.total) if self.scratch is None else self.scratch
        self.total.add_(_product(a, b, out=self.scratch))


def _logsumexp(logits: torch.Tensor) -> torch.Tensor:
    """``log Σ exp`` over each row, -inf for a row of nothing else; may destroy the logits, never copies them."""
    if has_kernels(logits):
        from megatron_longpo.gpu_kernels.softmax import logsumexp

        return logsumexp(logits)
    # The floor keeps a rank that holds only padding from computing -inf - -inf.
    largest = logits.amax(dim=1, keepdim=True).clamp_(min=torch.finfo(logits.dtype).min)
    return logits.sub_(largest).exp_().sum(dim=1).log_().add_(largest[:, 0])


def _softmax_error(
    logits: torch.Tensor, log_total: torch.Tensor, column: torch.Tensor, here: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """``softmax - onehot`` ``[c, V]`` in ``out``, which may be the logits; destroys them."""
    if has_kernels(logits):
        from megatron_longpo.gpu_kernels.softmax import softmax_error

        return softmax_error(logits, log_total, column, here, out)
    error = logits.sub_(log_total[:, None]).exp_()
    error.scatter_add_(1, column, -here.to(error.dtype))
    return error if out is logits else out.copy_(error)


def _combine_(stats: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Turn every rank's (log of partition sum, target logit) ``[2, K]`` into those of the whole vocabulary."""
    largest = stats[0].clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    stats[0].sub_(largest).exp_()
    dist.all_reduce(stats, op=dist.ReduceOp.SUM, group=group)
    stats[0].log_().add_(largest)
