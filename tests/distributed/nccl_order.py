"""What NCCL asks of a program and gloo does not: noted while gloo runs it, checked over all ranks afterwards.

Under gloo every transfer has its own thread, and messages find each other by tag, so a program can pass there and hang
on GPUs. NCCL wants contiguous tensors. A communicator makes its operations one after another, compares nothing, and
ignores tags; it begins with an operation in which the whole group takes part. Several communicators share the GPU:
with CUDA_DEVICE_MAX_CONNECTIONS=1, which tensor parallelism is run with, all operations of a rank start in the order
in which the host asks for them. `check_nccl_order` plays that worst case: one operation at a time on every rank, and
nothing is buffered.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

Group = tuple[str, tuple[int, ...]]
"""Its name, which is the same on all of its ranks, and these."""


@dataclass(frozen=True)
class Collective:
    """A call that every rank of the group makes: its name, and dtypes and sizes of all that may not differ."""

    group: Group
    name: str
    what: tuple[str, ...]


@dataclass(frozen=True)
class Message:
    """One direction of point-to-point communication with a rank of the world."""

    group: Group
    sent: bool
    peer: int
    what: tuple[str, ...]


Operation = Collective | tuple[Message, ...]
"""What one launch does: a collective, or messages that make progress together."""

_COLLECTIVE = re.compile("_?(all|reduce|broadcast|gather|scatter|send|recv|barrier)")
_DIFFERS = {"gather", "scatter"}
"""Here one rank alone has all the tensors."""
_ROOT = ("rootRank", "rootTensor")


@contextlib.contextmanager
def noted_operations() -> Iterator[list[Operation]]:
    """Note every operation of this rank, in the order in which it is started, and refuse what NCCL refuses.

    All of torch's functions, and what Megatron keeps of them, end in methods of the process group.
    """
    notes = _Notes()
    batch = dist.batch_isend_irecv

    def noted_batch(operations: list[dist.P2POp]) -> Any:
        notes.batch = []
        works = batch(operations)
        notes.operations.append(tuple(notes.batch))
        notes.batch = None
        return works

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "batch_isend_irecv", noted_batch)
        for name in filter(_COLLECTIVE.match, dir(dist.ProcessGroup)):
            patch.setattr(dist.ProcessGroup, name, notes.of(name))
        yield notes.operations


class _Notes:
    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.batch: list[Message] | None = None

    def of(self, name: str) -> Any:
        method = getattr(dist.ProcessGroup, name)

        @functools.wraps(method)
        def noted(group: dist.ProcessGroup, *args: Any, **named: Any) -> Any:
            self._note(group, name, (*args, *named.values()))
            return method(group, *args, **named)

        return noted

    def _note(self, group: dist.ProcessGroup, name: str, args: tuple[Any, ...]) -> None:
        tensors = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
        for tensor in tensors:
            assert tensor.is_contiguous(), f"{name} of a tensor with strides {tensor.stride()}"
        ranks = tuple(dist.get_process_group_ranks(group))
        named = (group.group_name, ranks)
        what = tuple(f"{x.dtype}[{x.numel()}]" for x in tensors)
        if name in ("send", "recv"):
            message = Message(named, name == "send", ranks[args[1]], what)
            if self.batch is None:
                self.operations.append((message,))
            else:
                self.batch.append(message)
            return
        assert name not in ("recv_anysource", "monitored_barrier"), f"NCCL has no {name}"
        roots = tuple(f"{getattr(x, root)}" for x in args for root in _ROOT if hasattr(x, root))
        self.operations.append(Collective(named, name, (*roots, *(() if name in _DIFFERS else what))))


def check_nccl_order(ranks: Sequence[Sequence[Operation]]) -> None:
    """Play the operations of all ranks as NCCL may run them at worst.

    Args:
        ranks: What every rank of the world noted.

    Raises:
        AssertionError: Some ranks would wait for each other forever, or mix up each other's data; says which, at what.
    """
    queues = [list(_with_beginnings(operations)) for operations in ranks]
    places = [0] * len(queues)
    missing = [_messages(queue, 0) for queue in queues]

    def head(rank: int) -> Operation | None:
        return queues[rank][places[rank]] if places[rank] < len(queues[rank]) else None

    def advance(rank: int) -> None:
        places[rank] += 1
        missing[rank] = _messages(queues[rank], places[rank])

    def play(rank: int) -> bool:
        """Whether the rank's next operation gets on."""
        operation = head(rank)
        if isinstance(operation, Collective):
            members = operation.group[1]
            assert rank in members, (rank, operation)
            ready = all(head(member) == operation for member in members)
            if ready:
                for member in members:
                    advance(member)
            return ready
        met = False
        for message in list(missing[rank]):
            partner = _first_meeting(missing[message.peer], message, rank)
            # Of messages in one direction between two ranks the first comes first.
            if partner is not None and message == _first_meeting(missing[rank], partner, message.peer):
                assert partner.what == message.what, f"rank {rank}: {message} meets rank {message.peer}: {partner}"
                missing[rank].remove(message)
                missing[message.peer].remove(partner)
                met = True
        for other in range(len(queues)):
            if isinstance(head(other), tuple) and not missing[other]:
                advance(other)
        return met

    while any(play(rank) for rank in range(len(queues)) if head(rank) is not None):
        pass
    stuck = [f"rank {rank}, operation {places[rank]}: {head(rank)}" for rank in range(len(queues)) if head(rank)]
    assert not stuck, "\n".join(["under NCCL these would wait for each other:", *stuck])


def _with_beginnings(operations: Sequence[Operation]) -> Iterator[Operation]:
    """A communicator's first operation is one of all its ranks: messages come after its beginning."""
    begun: set[Group] = set()
    for operation in operations:
        for part in operation if isinstance(operation, tuple) else (operation,):
            if part.group not in begun and isinstance(part, Message):
                yield Collective(part.group, "beginning", ())
            begun.add(part.group)
        yield operation


def _messages(queue: Sequence[Operation], place: int) -> list[Message]:
    operation = queue[place] if place < len(queue) else ()
    return list(operation) if isinstance(operation, tuple) else []


def _first_meeting(messages: Sequence[Message], message: Message, rank: int) -> Message | None:
    """The first of a rank's messages that this one of ``rank`` can meet."""
    for other in messages:
        if other.group == message.group and other.peer == rank and other.sent != message.sent:
            return other
    return None
