"""``torch.cuda`` as on a machine with one GPU: what the trainer and Megatron-Core ask it, answered without one.

Streams and events order nothing, since fake tensors have no data. Random states are those of a CPU's generator.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses import fake_tensor

host_waits: Counter[str] = Counter()
"""Calls that let the host wait for the device, by name."""


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
        "synchronize": _waits("torch.cuda.synchronize"),
        "Stream": Stream,
        "Event": Event,
        "current_stream": lambda device=None: Stream(),
        "default_stream": lambda device=None: Stream(),
        "stream": contextlib.nullcontext,
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


def _waits(name: str) -> Callable[..., None]:
    def wait(*_: Any) -> None:
        host_waits[name] += 1

    return wait


class Event:
    """A place in a stream."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    synchronize = _waits("Event.synchronize")


class Stream(torch.Stream):
    """A stream in which everything is done at once."""

    def __new__(cls, *_: Any, **__: Any) -> Stream:
        return super().__new__(cls, device="cuda:0")

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Event:
        return Event()

    synchronize = _waits("Stream.synchronize")
