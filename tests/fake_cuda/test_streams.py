"""The watch over streams finds each kind of race, and nothing where events order the work."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.fake_cuda.streams import COMPUTE, HOST, Races, Streams


class Device:
    """Two streams, and one tensor of the first that the second one reads."""

    def __init__(self) -> None:
        self.streams = Streams()
        self.copying = self.streams.new()
        self.races = Races(self.streams)
        # Not of the CPU, whose memory belongs to no stream.
        self.tensor: torch.Tensor | None = torch.empty(1, device="meta")
        self.races.begin(self.tensor, COMPUTE)

    def use(self, stream: int, writes: bool = False) -> None:
        assert self.tensor is not None
        tensors = [self.tensor]
        self.races.use([] if writes else tensors, tensors if writes else [], stream, "here")

    def order(self, first: int, second: int) -> None:
        self.streams.wait(second, self.streams.place(first))

    def free(self) -> None:
        self.tensor = None


def written_and_copied(device: Device) -> None:
    device.use(COMPUTE, writes=True)
    device.order(COMPUTE, device.copying)
    device.use(device.copying)


def freed_after_waiting(device: Device) -> None:
    written_and_copied(device)
    device.order(device.copying, COMPUTE)
    device.free()


def freed_after_the_host_waited(device: Device) -> None:
    written_and_copied(device)
    device.order(device.copying, HOST)
    device.free()


def freed_with_a_record(device: Device) -> None:
    written_and_copied(device)
    assert device.tensor is not None
    device.races.record(device.tensor, device.copying)
    device.free()


def two_readers(device: Device) -> None:
    written_and_copied(device)
    device.use(COMPUTE)
    device.order(device.copying, COMPUTE)
    device.free()


def read_too_early(device: Device) -> None:
    device.use(COMPUTE, writes=True)
    device.use(device.copying)
    device.order(device.copying, COMPUTE)


def written_while_it_is_read(device: Device) -> None:
    written_and_copied(device)
    device.use(COMPUTE, writes=True)


def memory_of_before(device: Device) -> None:
    """What a stream was given before the tensor began may still use its memory."""
    device.use(COMPUTE, writes=True)
    device.tensor = torch.empty(1, device="meta")
    device.races.begin(device.tensor, COMPUTE)
    device.use(device.copying, writes=True)


def freed_too_early(device: Device) -> None:
    written_and_copied(device)
    device.free()


def host_reads_too_early(device: Device) -> None:
    written_and_copied(device)
    device.use(HOST)


@pytest.mark.parametrize("story", [freed_after_waiting, freed_after_the_host_waited, freed_with_a_record, two_readers])
def test_ordered_work_is_no_race(story: Callable[[Device], None]) -> None:
    device = Device()
    story(device)
    assert not device.races.found


@pytest.mark.parametrize(
    ("story", "found"),
    [
        (read_too_early, "read beside a use of the same memory: here"),
        (written_while_it_is_read, "write beside a use of the same memory: here"),
        (memory_of_before, "write beside a use of the same memory: here"),
        (freed_too_early, "freed while another stream may still have it read"),
        (host_reads_too_early, "read beside a use of the same memory: here"),
    ],
)
def test_work_that_nothing_orders_is_a_race(story: Callable[[Device], None], found: str) -> None:
    device = Device()
    story(device)
    assert device.races.found == {found}
