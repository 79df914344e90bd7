"""What is mended in the way in which Megatron-Core writes a checkpoint's files, on every device."""

from __future__ import annotations

import functools
import multiprocessing
import os
import queue
import signal
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.managers import BaseProxy, SyncManager
from typing import Any

from megatron_longpo.processes import die_with_parent, outlive_sigterm


def write_checkpoints_in_threads() -> None:
    """Let a rank write its files in threads, as Megatron-Core does from 0.19 on.

    0.16 forks a process per file, out of a rank that uses CUDA and NCCL: it may crash there (NVIDIA/Megatron-LM#1861,
    and #3633, which made them threads), on Grace machines above all. What an asynchronous save does is still in a
    process that Megatron forks. Remove with 0.16.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    writer = filesystem_async.FileSystemWriterAsync
    if not hasattr(writer, "write_preloaded_data_multiproc"):
        return

    def write(transforms: Any, use_msc: bool, rank: int, buckets: list[Any], global_results: Any) -> None:
        results: queue.Queue[tuple[int, Any]] = queue.Queue()
        in_work: queue.Queue[int] = queue.Queue()

        def write_one(number: int) -> None:
            in_work.put(number)
            kwargs = {"use_msc": use_msc} if use_msc else {}
            writer.write_preloaded_data(transforms, number, buckets[number], results, in_work, use_fsync=True, **kwargs)

        with ThreadPoolExecutor(len(buckets)) as pool:
            list(pool.map(write_one, range(len(buckets))))
        written = dict(results.get_nowait() for _ in buckets)
        failed = [result for result in written.values() if isinstance(result, Exception)]
        global_results.put(failed[0] if failed else written)

    # Without garbage collection, as upstream: in the forked process it would free tensors of the rank.
    writer.write_preloaded_data_multiproc = staticmethod(filesystem_async._disable_gc()(write))


def prepare_write_results(async_save: bool) -> None:
    """Choose what carries the results of the next checkpoint's writers to the rank; call it before every save.

    A save that is waited for is written by threads of the rank, and needs a queue. Upstream gives it a process, as an
    asynchronous one, which imports torch and Megatron-Core at every rank to carry a few lines: seconds of the first
    save, and their memory. That process ends with its rank here, also when the rank is killed, but not before it: a
    SIGTERM to all processes would leave the rank, which saves then, without it.

    Remove when Megatron's writer needs no process for saves that are waited for, and ends the other itself.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if not async_save:
        filesystem_async._results_queue = queue.Queue()  # a new one: what a failed save left is not read by the next
    elif not isinstance(filesystem_async._results_queue, BaseProxy):
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        manager.start(initializer=outlive_sigterm)
        filesystem_async._results_queue = manager.Queue()


def tie_checkpoint_writers_to_their_rank() -> None:
    """Let the processes that write a checkpoint end with their rank, also when that is killed.

    Left alone they keep what they inherited: the lock on ``--save``, for ever if one waits for another, and the files
    of an attempt that the next run makes again under the same names.
    Remove when Megatron's writers end themselves.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    writer, rank = filesystem_async.FileSystemWriterAsync, os.getpid()

    def tied(upstream: Any) -> Any:
        @functools.wraps(upstream)
        def write(*args: Any, **kwargs: Any) -> Any:
            if os.getpid() != rank:  # a save that is waited for begins in the rank itself
                die_with_parent(signal.SIGKILL)
            return upstream(*args, **kwargs)

        return staticmethod(write)

    # The last name is that of 0.19.
    for name in ("write_preloaded_data", "write_preloaded_data_multiproc", "write_preloaded_data_multithread"):
        if hasattr(writer, name):
            setattr(writer, name, tied(getattr(writer, name)))
