"""Context parallelism by gathering keys and values, as Llama 3 was trained (arXiv 2407.21783, section 3.3.2).

Every rank keeps its zigzag queries and gathers the keys and values of the whole row, layer by layer. With grouped
queries those are small. Only local shards are saved: backward gathers again and reduce-scatters the gradients.

In the forward pass a layer's keys depend on the layer in front of it, so they cannot be gathered ahead of it. Its heads
do not depend on each other: on long rows they go in a few chunks, each gathered while attention computes the one
before, and the gradients of each are reduced while the next one is computed. In the backward pass the keys of the next
layer to come are there already, and its first chunk is gathered ahead (`function`). So forward waits for the first
gather, backward for the last reduction, and the gathered keys and values of two chunks are all that is in memory.
"""

# t=local tokens T=tokens of the row N=query heads G=key/value heads D=head_dim

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_longpo.attention.function import Gradients, RowAttention, Saved, check_shapes
from megatron_longpo.attention.kept import Result
from megatron_longpo.attention.row_order import to_rank_order, to_row_order
from megatron_longpo.attention.shared_prefix import backward_into, empty_results, forward_into
from megatron_longpo.attention.tiles import plan
from megatron_longpo.config.training import FLASH
from megatron_longpo.data.layout import RowLayout
from megatron_longpo.ranges import COMM, named_range

# torch 2.13 renamed both.
_all_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
_reduce_scatter = dist.reduce_scatter_single if hasattr(dist, "reduce_scatter_single") else dist.reduce_scatter_tensor

MAX_HEAD_CHUNKS = 4
"""With so many, three quarters of the transfer are behind computation; more are smaller kernels for little."""
CHUNKED_FROM_BYTES = 2**23
"""Local keys and values from which chunks pay: below, the latency of a collective is most of it."""


def all_gather_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: RowLayout,
    cp_group: dist.ProcessGroup,
    scale: float,
    backend: str = FLASH,
) -> torch.Tensor:
    """Attention for ``--cp-comm-type all_gather``; arguments and result are those of `context_parallel_attention`.

    Collectives, per chunk of heads (1 to `MAX_HEAD_CHUNKS`): 1 CP all-gather forward; 1 CP all-gather and 1 CP
    reduce-scatter backward. K and V travel together.

    Raises:
        ValueError: Shapes do not fit the layout or each other.
    """
    check_shapes(q, k, v, layout.local_tokens)
    return _AllGather(layout, scale, cp_group, backend=backend)(q, k, v)


@dataclass(frozen=True)
class _AllGather(RowAttention):
    """All tiles of the rank's queries, a chunk of heads at a time; see `all_gather_attention` for the collectives."""

    cp_group: dist.ProcessGroup

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Result:
        """Output ``[t, N, D]`` and log-sum-exps ``[N, t]`` of this rank's queries; 1 all-gather per chunk of heads."""
        kernel = self.kernel(q)
        tiles = kernel.cut(plan(self.layout, dist.get_rank(self.cp_group)))
        out, lse = empty_results(q)
        for heads, row_k, row_v in self._gathered(q, k, v):
            of = heads.queries
            forward_into(out[:, of], lse[of], q[:, of], row_k, row_v, tiles, self.scale, kernel)
        return out, lse

    def start_backward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> _Gather:
        """Start the all-gather of the first chunk of heads, which needs no gradient."""
        return self._gather(k, v, _chunks(q, k, v)[0])

    def backward(self, grad_out: torch.Tensor, saved: Saved, started: _Gather | None) -> Gradients:
        """dq, and dk and dv of this rank's tokens, summed in fp32. Per chunk: 1 CP all-gather, 1 reduce-scatter."""
        q, k, v, out, lse = saved
        kernel = self.kernel(q)
        tiles = kernel.cut(plan(self.layout, dist.get_rank(self.cp_group)))
        # Half precision is summed over ranks in fp32; on every rank, also where a plan adds nothing up.
        sum_dtype = torch.promote_types(k.dtype, torch.float32)
        key_dtype = sum_dtype if tiles.adds_keys else k.dtype
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        sums = []
        for heads, row_k, row_v in self._gathered(q, k, v, started):
            row_dk = torch.empty(row_k.shape, dtype=key_dtype, device=k.device)
            row_dv = torch.empty(row_v.shape, dtype=key_dtype, device=v.device)
            of = heads.queries
            backward_into(
                *(dq[:, of], row_dk, row_dv),
                *(grad_out[:, of], q[:, of], row_k, row_v, out[:, of], lse[of]),
                *(tiles, self.scale, kernel),
            )
            sums.append(_LocalSum(row_dk, row_dv, self.layout, self.cp_group, sum_dtype))
        dk, dv = torch.cat([part.wait() for part in sums], 2).unbind(1)
        return dq, dk, dv

    def _gathered(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, started: _Gather | None = None
    ) -> Iterator[tuple[_Heads, torch.Tensor, torch.Tensor]]:
        """Every chunk of heads with its keys and values ``[T, g, D]`` in row order; the next is under way meanwhile."""
        chunks = _chunks(q, k, v)
        pending = self._gather(k, v, chunks[0]) if started is None else started
        for number, heads in enumerate(chunks):
            row_k, row_v = pending.wait()
            if number + 1 < len(chunks):
                pending = self._gather(k, v, chunks[number + 1])
            yield heads, row_k, row_v

    def _gather(self, k: torch.Tensor, v: torch.Tensor, heads: _Heads) -> _Gather:
        return _Gather(k, v, heads.keys, self.layout, self.cp_group)


@dataclass(frozen=True)
class _Heads:
    """Key/value heads that are gathered together, and the query heads that attend to them."""

    keys: slice
    queries: slice


def head_chunks(num_heads: int, num_key_heads: int, local_bytes: int) -> list[_Heads]:
    """How the heads are divided.

    Args:
        num_heads: Query heads.
        num_key_heads: Key/value heads; every chunk has equally many.
        local_bytes: Bytes of a rank's keys and values.
    """
    count = 1
    if local_bytes >= CHUNKED_FROM_BYTES:
        count = max(n for n in range(1, MAX_HEAD_CHUNKS + 1) if num_key_heads % n == 0)
    keys, queries = num_key_heads // count, num_heads // count
    return [_Heads(slice(i * keys, (i + 1) * keys), slice(i * queries, (i + 1) * queries)) for i in range(count)]


def _chunks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[_Heads]:
    return head_chunks(q.shape[1], k.shape[1], k.nbytes + v.nbytes)


class _Gather:
    """Local keys and values of some heads, on their way to every rank. 1 CP all-gather."""

    def __init__(
        self, k: torch.Tensor, v: torch.Tensor, heads: slice, layout: RowLayout, cp_group: dist.ProcessGroup
    ) -> None:
        self._layout = layout
        self._local = torch.stack((k[:, heads], v[:, heads]), 1)
        self._by_rank = self._local.new_empty((layout.padded_tokens, *self._local.shape[1:]))
        with named_range(COMM):
            self._work = _all_gather(self._by_rank, self._local, group=cp_group, async_op=True)

    def wait(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Two views ``[T, g, D]`` in row order."""
        with named_range(COMM):
            self._work.wait()
        row_k, row_v = self._by_rank.index_select(0, to_row_order(self._layout, self._by_rank.device)).unbind(1)
        return row_k, row_v


class _LocalSum:
    """Partial gradients ``[T, g, D]`` in row order, on their way to their sums on the ranks that hold the tokens.

    1 CP reduce-scatter.
    """

    def __init__(
        self,
        row_dk: torch.Tensor,
        row_dv: torch.Tensor,
        layout: RowLayout,
        cp_group: dist.ProcessGroup,
        dtype: torch.dtype,
    ) -> None:
        row = torch.stack((row_dk.to(dtype), row_dv.to(dtype)), 1)
        self._by_rank = row.index_select(0, to_rank_order(layout, row.device))
        self._local = row.new_empty((layout.local_tokens, *row.shape[1:]))
        with named_range(COMM):
            self._work = _reduce_scatter(self._local, self._by_rank, group=cp_group, async_op=True)

    def wait(self) -> torch.Tensor:
        """``[t, 2, g, D]``."""
        with named_range(COMM):
            self._work.wait()
        return self._local
