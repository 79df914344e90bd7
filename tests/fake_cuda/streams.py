"""Finds what a GPU may do in an order that nobody asked for: vector clocks of streams and host, and who used what when.

Work on one stream is done in order, and work on two only as far as events say. The host sees the end of work where it
waits for it, and what it queues afterwards comes after that. A tensor's memory belongs to the stream that it was made
on: freed, it is used again in that stream's order, whatever other streams still do with it (torch's caching allocator).
Pinned memory is freed when the copies from and to it are done (``CachingHostAllocator``).

Clocks of vectors: C. Fidge 1988, F. Mattern 1989.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

Clock = dict[int, int]
"""By stream how much of its work is known to be done before; `HOST` is the host itself."""

HOST = 0
COMPUTE = 1
"""The default stream."""


class Streams:
    """The clocks of all streams, and the stream that work is queued on now."""

    def __init__(self) -> None:
        self.clocks: dict[int, Clock] = {HOST: {}, COMPUTE: {}}
        self.current = COMPUTE

    def new(self) -> int:
        """One more stream."""
        number = len(self.clocks)
        self.clocks[number] = {}
        return number

    @contextlib.contextmanager
    def on(self, stream: int) -> Iterator[None]:
        """Inside, work is queued on this stream."""
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def wait(self, stream: int, known: Clock) -> None:
        """What a stream is given from now on, or what the host does, comes after all that a clock knows."""
        for other, time in known.items():
            self.clocks[stream][other] = max(self.clocks[stream].get(other, 0), time)

    def place(self, stream: int) -> Clock:
        """What is done when a stream has come to where it is now: an event."""
        return dict(self.clocks[stream])

    def work(self, stream: int) -> int:
        """Queue one operation, behind all that the host knows of. Returns its time."""
        self.wait(stream, self.clocks[HOST])
        clock = self.clocks[stream]
        clock[stream] = clock.get(stream, 0) + 1
        return clock[stream]


@dataclass
class _Uses:
    """Of a storage: its stream, the times of the last uses by stream, and the streams that its end waits for."""

    owner: int
    writes: Clock = field(default_factory=dict)
    reads: Clock = field(default_factory=dict)
    recorded: set[int] = field(default_factory=set)


class Races:
    """Watches storages.

    Attributes:
        found: Descriptions of races, each once.
    """

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._uses: dict[int, _Uses] = {}
        self.found: set[str] = set()

    def use(self, reads: list[torch.Tensor], writes: list[torch.Tensor], stream: int, place: str) -> None:
        """An operation on a stream; storages that were never seen begin here."""
        time = self._streams.work(stream)
        clock = self._streams.clocks[stream]
        for tensors, is_write in ((reads, False), (writes, True)):
            for tensor in tensors:
                uses = self._of(tensor, stream)
                unseen = _after(uses.writes, clock) | (_after(uses.reads, clock) if is_write else set())
                if unseen:
                    self.found.add(f"{'write' if is_write else 'read'} beside a use of the same memory: {place}")
        for tensors, kind in ((reads, "reads"), (writes, "writes")):
            for tensor in tensors:
                getattr(self._of(tensor, stream), kind)[stream] = time

    def record(self, tensor: torch.Tensor, stream: int) -> None:
        """``Tensor.record_stream``."""
        self._of(tensor, stream).recorded.add(stream)

    def begin(self, tensor: torch.Tensor, stream: int) -> None:
        """Memory is given out, and not used yet."""
        self._of(tensor, stream)

    def _of(self, tensor: torch.Tensor, stream: int) -> _Uses:
        storage = tensor.untyped_storage()
        # By address of the object in C++: the tensors of a fake device have no data.
        key = storage._cdata
        if key not in self._uses:
            # All that was queued on its stream before may still have this memory.
            self._uses[key] = _Uses(stream, writes={stream: self._streams.clocks[stream].get(stream, 0)})
            weakref.finalize(storage, self._end, key, tensor.device.type == "cpu").atexit = False
        return self._uses[key]

    def _end(self, key: int, on_host: bool) -> None:
        uses = self._uses.pop(key)
        if on_host:
            return
        known = dict(self._streams.clocks[uses.owner])
        for other, time in self._streams.clocks[HOST].items():
            known[other] = max(known.get(other, 0), time)
        for times, what in ((uses.reads, "read"), (uses.writes, "written")):
            if _after(times, known) - uses.recorded - {uses.owner}:
                self.found.add(f"freed while another stream may still have it {what}")


def _after(times: Clock, known: Clock) -> set[int]:
    """The streams whose uses are not known to be done."""
    return {stream for stream, time in times.items() if time > known.get(stream, 0)}
