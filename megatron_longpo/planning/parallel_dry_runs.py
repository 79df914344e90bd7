"""Dry runs side by side: every pipeline stage of every layout is a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any, TypeVar

from tqdm import tqdm

from megatron_longpo.config import RunConfig
from megatron_longpo.data.rows import TrainingRow
from megatron_longpo.planning.dry_run import RankMemory, dry_run_stage, measured_stages
from megatron_longpo.processes import die_with_parent

Result = TypeVar("Result")


def dry_runs(
    runs: Sequence[tuple[RunConfig, int]], rows: Sequence[TrainingRow], title: str = "dry run"
) -> list[list[RankMemory]]:
    """The peaks of several runs, each with its number of ranks, over the same rows; progress goes to stderr.

    Args:
        runs: Validated configurations, and their numbers of ranks.
        rows: The longest micro-batch.
        title: What the progress is called.

    Returns:
        For every run its first and its last pipeline stage.
    """
    tasks = [(number, stage) for number, (config, _) in enumerate(runs) for stage in measured_stages(config)]
    results: list[list[RankMemory]] = [[] for _ in runs]
    with _progress(title, len(tasks)) as bar:
        if len(tasks) == 1:
            (config, world_size), (_, stage) = runs[0], tasks[0]
            results[0].append(dry_run_stage(config, world_size, stage, rows))
            bar.update()
            return results
        workers = min(len(tasks), os.cpu_count() or 1)
        # Fresh processes: the fake world is global state, and forked ones would inherit torch's threads.
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _prepare_worker) as pool:
            try:
                waiting = {_submit(pool, dry_run_stage, *runs[number], stage, rows): number for number, stage in tasks}
                for future in _as_completed(waiting, bar):
                    results[waiting[future]].append(future.result())
            except BaseException:
                # Ctrl-C or a failed stage: what the others would find is of no use, and a stage takes minutes.
                for process in multiprocessing.active_children():
                    process.terminate()
                raise
    return [sorted(stages, key=lambda stage: stage.stage) for stages in results]


def _progress(title: str, num_stages: int) -> tqdm:  # type: ignore[type-arg]
    """A bar of stages and time on stderr; a log file gets a line every half minute."""
    live = sys.stderr.isatty()
    return tqdm(
        total=num_stages,
        desc=title,
        bar_format="{desc}: {n_fmt} of {total_fmt} pipeline stages, {elapsed} so far, {remaining} left",
        mininterval=0.5 if live else 30.0,
        leave=not live,
        dynamic_ncols=True,
    )


def _as_completed(
    futures: Iterable[Future[Result]],
    bar: tqdm,  # type: ignore[type-arg]
) -> Iterator[Future[Result]]:
    """The futures as they finish. The time on the bar moves meanwhile, since a stage takes up to two minutes."""
    pending = set(futures)
    while pending:
        finished, pending = wait(pending, timeout=1.0, return_when=FIRST_COMPLETED)
        yield from finished
        bar.update(len(finished))


def _submit(pool: ProcessPoolExecutor, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
    """Submitting starts workers. Ctrl-C is the parent's to answer, so they are born with the signal blocked: they take
    seconds to import what they need, and would end with a traceback of that."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(function, *arguments)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _prepare_worker() -> None:
    """Fake tensors compute nothing that threads could share."""
    import torch

    die_with_parent()
    torch.set_num_threads(1)
