"""Context parallelism by passing keys and values around a ring (Ring Attention, arXiv 2310.01889).

Every rank keeps its zigzag queries and computes on one rank's keys after another, while the next ones are on their way.
Partial results merge by log-sum-exp like all tiles; no rank ever holds the whole row's keys. In the backward pass the
gradients of what travels follow one hop behind, each rank adding its share, and arrive at home after the last step.

The branches' keys go around with the prefix's: they are few, and gathering them would be a second way to communicate.
Under a sliding window no key leaves its rank that no other rank sees (`ring_tiles`); the hops stay as many.
"""

# t=local tokens s=tokens that are sent N=query heads G=key/value heads D=head_dim

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_longpo.attention.function import Gradients, RowAttention, Saved, check_shapes
from megatron_longpo.attention.kept import Result
from megatron_longpo.attention.ring_tiles import RingPlan, ring_plan
from megatron_longpo.attention.shared_prefix import backward_into, empty_results, forward_into
from megatron_longpo.attention.tiles import Plan
from megatron_longpo.config.training import FLASH
from megatron_longpo.data.layout import RowLayout
from megatron_longpo.ranges import COMM, named_range

_KEYS, _GRADIENTS = 0, 1
"""Tags that tell the two streams of messages between a pair of ranks apart (gloo matches by tag, NCCL by order)."""


def ring_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: RowLayout,
    cp_group: dist.ProcessGroup,
    scale: float,
    backend: str = FLASH,
) -> torch.Tensor:
    """Attention for ``--cp-comm-type p2p``; arguments and result are those of `context_parallel_attention`.

    Collectives: cp - 1 sends of keys and values to the next rank forward; cp - 1 of these and cp - 1 of their
    gradients, in fp32 at least, backward; each but the last behind the computation of a step.

    Raises:
        ValueError: Shapes do not fit the layout or each other.
    """
    check_shapes(q, k, v, layout.local_tokens)
    return _RingAttention(layout, scale, cp_group, backend=backend)(q, k, v)


@dataclass(frozen=True)
class _RingAttention(RowAttention):
    """A step for every rank's keys; cp - 1 sends forward, 2 (cp - 1) backward."""

    cp_group: dist.ProcessGroup

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Result:
        """Output ``[t, N, D]`` and log-sum-exps ``[N, t]``, merged over the steps; cp - 1 sends of keys and values."""
        ring = _Ring(self.cp_group)
        kernel = self.kernel(q)
        out, lse = empty_results(q)
        for tiles, keys, values in _steps(ring, ring_plan(self.layout, ring.rank), k, v):
            forward_into(out, lse, q, keys, values, kernel.cut(tiles), self.scale, kernel)
        return out, lse

    def backward(self, grad_out: torch.Tensor, saved: Saved, started: None) -> Gradients:
        """dq, and dk and dv in fp32 (fp64 for fp64), which travel behind their keys; 2 (cp - 1) sends."""
        q, k, v, out, lse = saved
        ring = _Ring(self.cp_group)
        plan = ring_plan(self.layout, ring.rank)
        kernel = self.kernel(q)
        # Sums over ranks: half precision is added up in fp32, also where a rank adds once.
        sum_dtype = torch.promote_types(k.dtype, torch.float32)
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        own = torch.empty((2, *k.shape), dtype=sum_dtype, device=k.device)
        travelling: _Transfer | None = None
        for step, (tiles, keys, values) in enumerate(_steps(ring, plan, k, v)):
            grads = own if step == 0 else torch.empty((2, *keys.shape), dtype=sum_dtype, device=k.device)
            backward_into(
                *(dq, grads[0], grads[1], grad_out, q, keys, values, out, lse), kernel.cut(tiles), self.scale, kernel
            )
            if travelling is not None:
                grads += travelling.received()
            if step > 0:
                travelling = ring.send(grads, (*plan.num_keys, plan.num_sent)[step + 1], _GRADIENTS)
        if travelling is not None:
            parts = travelling.received().split([stop - start for start, stop in plan.sent], 1)
            for (start, stop), part in zip(plan.sent, parts, strict=True):
                own[:, start:stop] += part
        return dq, own[0], own[1]


def _steps(
    ring: _Ring, plan: RingPlan, k: torch.Tensor, v: torch.Tensor
) -> Iterator[tuple[Plan, torch.Tensor, torch.Tensor]]:
    """The tiles of every step, its keys and its values; the next ones are under way meanwhile. cp - 1 sends."""
    keys, values = k, v
    block = torch.cat([x[start:stop] for x in (k, v) for start, stop in plan.sent]).unflatten(0, (2, -1))
    for step, tiles in enumerate(plan.steps):
        following = ring.send(block, plan.num_keys[step + 1], _KEYS) if step + 1 < ring.size else None
        yield tiles, keys, values
        if following is not None:
            block = following.received()
            keys, values = block


class _Ring:
    """The neighbours of this rank."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._next = dist.get_global_rank(group, (self.rank + 1) % self.size)
        self._previous = dist.get_global_rank(group, (self.rank - 1) % self.size)

    def send(self, tensor: torch.Tensor, num_incoming: int, tag: int) -> _Transfer:
        """Start to send ``[2, s, G, D]`` to the next rank and to receive ``[2, num_incoming, G, D]`` from the previous.

        The tensor must not change until the transfer is `received`.
        """
        with named_range(COMM):
            incoming = tensor.new_empty((2, num_incoming, *tensor.shape[2:]))
            operations = [
                dist.P2POp(dist.isend, tensor, self._next, self.group, tag),
                dist.P2POp(dist.irecv, incoming, self._previous, self.group, tag),
            ]
            return _Transfer(tensor, incoming, dist.batch_isend_irecv(operations))


class _Transfer:
    """One hop in flight; keeps both tensors alive."""

    def __init__(self, outgoing: torch.Tensor, incoming: torch.Tensor, works: list[dist.Work]) -> None:
        self._outgoing, self._incoming, self._works = outgoing, incoming, works

    def received(self) -> torch.Tensor:
        """Wait for both directions; returns what came."""
        with named_range(COMM):
            for work in self._works:
                work.wait()
        return self._incoming
