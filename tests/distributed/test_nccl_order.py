"""Programs that hang or mix up data under NCCL and pass under gloo are found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed.harness import run_ranks
from tests.distributed.nccl_order import Collective, Group, Message, Operation, check_nccl_order, noted_operations

A: Group = ("a", (0, 1))
B: Group = ("b", (0, 1))


def reduced(group: Group, what: str = "float32[4]") -> Collective:
    return Collective(group, "all_reduce", (what,))


def sent(peer: int, what: str = "float32[4]", group: Group = A) -> Message:
    return Message(group, True, peer, (what,))


def received(peer: int, what: str = "float32[4]", group: Group = A) -> Message:
    return Message(group, False, peer, (what,))


def ring(size: int) -> list[list[Operation]]:
    group = ("ring", tuple(range(size)))
    return [
        [(sent((rank + 1) % size, group=group), received((rank - 1) % size, group=group))] * 3 for rank in range(size)
    ]


PASSING: dict[str, list[list[Operation]]] = {
    "nothing": [[], []],
    "one order of two groups": [[reduced(A), reduced(B)]] * 2,
    "a ring of batches": ring(4),
    "a ring of two": ring(2),
    "one sends, one receives": [[(sent(1),)], [(received(0),)]],
    "groups that share no rank": [[reduced(("c", (0,)))], [reduced(("d", (1,)))] * 2],
}
HANGING: dict[str, list[list[Operation]]] = {
    "two groups in two orders": [[reduced(A), reduced(B)], [reduced(B), reduced(A)]],
    "three groups in a circle": [
        [reduced(("x", (0, 1))), reduced(("z", (0, 2)))],
        [reduced(("y", (1, 2))), reduced(("x", (0, 1)))],
        [reduced(("z", (0, 2))), reduced(("y", (1, 2)))],
    ],
    "one call too few": [[reduced(A), reduced(A)], [reduced(A)]],
    "another size": [[reduced(A)], [reduced(A, "float32[5]")]],
    "both send before they receive": [[(sent(1),), (received(1),)], [(sent(0),), (received(0),)]],
    "a group's first messages leave a rank out": [
        [(sent(1, group=("c", (0, 1, 2))),)],
        [(received(0, group=("c", (0, 1, 2))),)],
        [],
    ],
    "a transfer and a collective that cross": [[(sent(1),), reduced(B)], [reduced(B), (received(0),)]],
}


@pytest.mark.parametrize("name", PASSING)
def test_programs_that_nccl_runs(name: str) -> None:
    check_nccl_order(PASSING[name])


@pytest.mark.parametrize("name", HANGING)
def test_programs_that_hang(name: str) -> None:
    with pytest.raises(AssertionError, match="would wait for each other:\nrank 0"):
        check_nccl_order(HANGING[name])


def test_messages_meet_in_order_and_not_by_tag() -> None:
    batches: list[list[Operation]] = [
        [(sent(1, "float32[4]"), sent(1, "float32[9]"))],
        [(received(0, "float32[9]"), received(0, "float32[4]"))],
    ]
    with pytest.raises(AssertionError, match="meets rank"):
        check_nccl_order(batches)


def real_program(rank: int, folder: str) -> list[Operation]:
    """A ring's hop, an all-reduce, and strides that gloo takes."""
    other = 1 - rank
    with noted_operations() as operations:
        ours, theirs = torch.full((4,), float(rank)), torch.empty(4)
        hop = [dist.P2POp(dist.isend, ours, other), dist.P2POp(dist.irecv, theirs, other)]
        for work in dist.batch_isend_irecv(hop):
            work.wait()
        assert theirs.tolist() == [other] * 4
        dist.all_reduce(ours)
        with pytest.raises(AssertionError, match="strides"):
            dist.all_reduce(torch.ones(4, 4).T)
        dist.barrier()
    return operations


def test_operations_of_real_processes_are_noted(tmp_path: Path) -> None:
    ranks = run_ranks(real_program, 2, str(tmp_path))
    group = ("0", (0, 1))
    for rank, (hop, *others) in enumerate(ranks):
        assert hop == (sent(1 - rank, "torch.float32[4]", group), received(1 - rank, "torch.float32[4]", group))
        assert [(o.group, o.name) for o in others] == [(group, "allreduce"), (group, "barrier")]
    check_nccl_order(ranks)
