"""Ctrl-C and SIGTERM while coroutines run."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from megatron_longpo.processes import FirstInterrupt


@contextlib.contextmanager
def interrupts_cancel_this_task() -> Iterator[None]:
    """Where `FirstInterrupt` handles signals, let them cancel the task that runs the block; KeyboardInterrupt follows.

    For asyncio's main task, which ends its parts in order then. KeyboardInterrupt itself would come up in any of them,
    and the others would wait for it.
    """
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None
    found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers = {number: handler for number, handler in found.items() if isinstance(handler, FirstInterrupt)}
    came = False

    def cancel(number: int, frame: FrameType | None) -> None:
        nonlocal came
        try:
            handlers[signal.Signals(number)](number, frame)
        except KeyboardInterrupt:
            came = True
            task.cancel()
            loop.call_soon_threadsafe(lambda: None)  # it may be waiting for something else

    for number in handlers:
        signal.signal(number, cancel)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if came:
            raise KeyboardInterrupt
