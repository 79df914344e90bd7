"""What a profiler records on this device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_longpo.platform.devices import has_cuda


def profiler_activities() -> list[torch.profiler.ProfilerActivity]:
    """What a profile records: the host, and the device where there is one."""
    activity = torch.profiler.ProfilerActivity
    return [activity.CPU, activity.CUDA] if has_cuda() else [activity.CPU]


@contextlib.contextmanager
def nsight_range() -> Iterator[None]:
    """What runs inside is captured by ``nsys profile --capture-range=cudaProfilerApi``, with its named ranges."""
    with torch.autograd.profiler.emit_nvtx():
        torch.cuda.cudart().cudaProfilerStart()
        try:
            yield
        finally:
            torch.cuda.cudart().cudaProfilerStop()


@contextlib.contextmanager
def around_waits(make_context: Callable[[], contextlib.AbstractContextManager[Any]]) -> Iterator[None]:
    """Wait for collectives, whoever waits, in a context of its own: what a profile shows as communication on a CPU.

    Remove when torch's profiler has a range for ``Work.wait``.
    """
    work: Any = torch.distributed.Work
    wait = work.wait

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with make_context():
            return wait(*args, **kwargs)

    work.wait = wrapped
    try:
        yield
    finally:
        work.wait = wait
