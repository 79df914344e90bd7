"""``torch.cuda`` as on a machine with one GPU: what the trainer and Megatron-Core ask it, answered without one.

Fake tensors have no data, so everything is done at once; `STREAMS` knows what a GPU would have to wait for. Random
states are those of a CPU's generator.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

import torch
from torch._subclasses import fake_tensor

from tests.fake_cuda.streams import COMPUTE, HOST, Clock, Streams

host_waits: Counter[str] = Counter()
"""Calls that let the host wait for the device, by name."""

STREAMS = Streams()
"""Of the device."""


def pretend() -> None:
    """Let this process, and everything that it imports from now on, find a GPU."""
    generator = torch.Generator()
    for name, answer in {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: "fake GPU",
        "get_device_capability": lambda device=None: (9, 0),
        "empty_cache": lambda: None,
        "max_memory_allocated": lambda device=None: 0,
        "synchronize": synchronize,
        "Stream": Stream,
        "Event": Event,
        "current_stream": lambda device=None: Stream(STREAMS.current),
        "default_stream": lambda device=None: Stream(COMPUTE),
        "stream": lambda stream: contextlib.nullcontext() if stream is None else STREAMS.on(stream.number),
        "default_generators": (generator,),
        "manual_seed": generator.manual_seed,
        "manual_seed_all": generator.manual_seed,
        "get_rng_state": lambda device=None: generator.get_state(),
        "set_rng_state": lambda state, device=None: generator.set_state(state),
    }.items():
        setattr(torch.cuda, name, answer)
    for name in ("get_rng_state", "set_rng_state", "manual_seed", "manual_seed_all"):
        setattr(torch.cuda.random, name, getattr(torch.cuda, name))
    # Fake tensors would otherwise touch the GPU that they find.
    fake_tensor.FakeTensorMode.avoid_device_init = True
    fake_tensor.init_gpu_context = lambda device: None


def synchronize(device: Any = None) -> None:
    """The host waits for all streams."""
    host_waits["torch.cuda.synchronize"] += 1
    for stream in range(COMPUTE, len(STREAMS.clocks)):
        STREAMS.wait(HOST, STREAMS.place(stream))


class Event:
    """A place in a stream."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.place: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        self.place = STREAMS.place(_number(stream))

    def wait(self, stream: Stream | None = None) -> None:
        STREAMS.wait(_number(stream), self.place)

    def synchronize(self) -> None:
        host_waits["Event.synchronize"] += 1
        STREAMS.wait(HOST, self.place)


class Stream(torch.Stream):
    """A stream of `STREAMS`: a new one, or that with a number."""

    number: int

    def __new__(cls, number: Any = None, *_: Any, **__: Any) -> Stream:
        stream = super().__new__(cls, device="cuda:0")
        stream.number = number if isinstance(number, int) else STREAMS.new()
        return stream

    def wait_stream(self, stream: Stream) -> None:
        STREAMS.wait(self.number, STREAMS.place(stream.number))

    def wait_event(self, event: Event) -> None:
        STREAMS.wait(self.number, event.place)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        host_waits["Stream.synchronize"] += 1
        STREAMS.wait(HOST, STREAMS.place(self.number))


def _number(stream: Stream | None) -> int:
    return STREAMS.current if stream is None else stream.number
