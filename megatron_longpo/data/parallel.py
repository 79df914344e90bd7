"""Map a function over a stream with worker processes: in order, in bounded memory, and stoppable."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_QUEUED_PER_WORKER = 2
"""Items in flight for each worker: one in work, one waiting, so that no worker idles and memory stays bounded."""

_function: Callable[[Any], Any] | None = None


def ordered_map(
    make_function: Callable[..., Callable[[Item], Result]],
    arguments: tuple[Any, ...],
    items: Iterable[Item],
    num_workers: int,
) -> Generator[Result, None, None]:
    """Yield ``make_function(*arguments)(item)`` for every item, in the order of the items.

    Args:
        make_function: A module-level function; every worker calls it once. With one worker it is called here.
        arguments: Its arguments; picklable.
        items: Read only as fast as results are taken.
        num_workers: Worker processes; 1 works in this process.

    Raises:
        ValueError: Fewer than one worker; a worker died (mostly for lack of memory). Errors of the function and of
            the items pass through. However the generator ends, its workers have ended too.
    """
    if num_workers < 1:
        raise ValueError(f"--workers {num_workers} must be at least 1")
    if num_workers == 1:
        yield from map(make_function(*arguments), items)
        return
    # Spawned, not forked: this process may hold threads, and a fork copies their locks in whatever state they are.
    executor = ProcessPoolExecutor(
        num_workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(make_function, arguments),
    )
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(_submit(executor, item))
            if len(pending) >= num_workers * _QUEUED_PER_WORKER:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise ValueError(
            f"a worker process died, mostly for lack of memory: use fewer than --workers {num_workers}, or 1 to see why"
        ) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _submit(executor: ProcessPoolExecutor, item: Any) -> Future[Any]:
    """Submitting starts workers. Ctrl-C reaches them too, but the parent alone decides what happens then, so they are
    born with the signal blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return executor.submit(_work, item)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(make_function: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]) -> None:
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    global _function
    _function = make_function(*arguments)


def _exit_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(item: Any) -> Any:
    assert _function is not None
    return _function(item)
