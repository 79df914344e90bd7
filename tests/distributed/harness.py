"""Run a function on several real gloo ranks, each its own process, and bring back what every rank returned."""

from __future__ import annotations

import datetime
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT_S = 400
IMPORTED = ["torch._dynamo", "megatron_longpo.training.loop", "megatron.core.models.gpt", "transformers.models.auto"]
"""What the server of forks imports: it takes longer than most tests."""
PYTHONPATH = os.environ.get("PYTHONPATH")
"""Where packages are found outside of tests."""


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, forked: bool = True) -> list[Any]:
    """Call ``function(rank, *args)`` on every rank of a new gloo world and return the results in rank order.

    Args:
        function: A module-level function; it and its arguments are pickled to the new processes.
        world_size: Number of processes.
        forked: Fork them from a process that has imported all (`IMPORTED`), where that is possible. Others have each
            its own order of sets of strings, as torchrun's: for tests of what ranks send each other.

    Raises:
        AssertionError: A rank failed; the message holds its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        # A test that finds packages elsewhere needs processes that have not imported any, and what is imported may have
        # asked for GPUs, which no fork can use then.
        forked = forked and os.environ.get("PYTHONPATH") == PYTHONPATH and not torch.cuda.is_available()
        context: Any = mp.get_context("forkserver" if forked else "spawn")
        if forked:
            context.set_forkserver_preload(IMPORTED)
        # A fork has the environment that its server was started with.
        environment = dict(os.environ) if forked else None
        processes = [
            context.Process(target=_rank_main, args=(function, rank, world_size, folder, environment, args))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        wait_for_all(processes)
        failures = sorted(Path(folder).glob("*.error"), key=lambda p: p.stat().st_mtime)
        assert not failures, f"{failures[0].stem} failed first:\n{failures[0].read_text()}"
        codes = [process.exitcode for process in processes]
        assert codes == [0] * world_size, f"exit codes {codes}"
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(world_size)]


def wait_for_all(processes: list[Any]) -> None:
    """Wait until all have ended; if one fails, what the others wait for never comes, and they get ten seconds."""
    deadline = time.monotonic() + TIMEOUT_S
    while (alive := [process for process in processes if process.is_alive()]) and time.monotonic() < deadline:
        if any(process.exitcode for process in processes):
            deadline = min(deadline, time.monotonic() + 10)
        wait([process.sentinel for process in alive], timeout=1)
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()


def fresh_world(rendezvous: str, rank: int, world_size: int) -> None:
    """Leave the current world, with all groups and threads that Megatron made in it, and enter a new one.

    Args:
        rendezvous: A file that does not exist yet; the same on every rank.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=TIMEOUT_S),
    )


def _rank_main(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    folder: str,
    environment: dict[str, str] | None,
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    if environment is not None:
        os.environ.clear()
        os.environ.update(environment)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    try:
        fresh_world(f"{folder}/rendezvous", rank, world_size)
        result = function(rank, *args)
        torch.save(result, Path(folder, f"{rank}.pt"))
        if dist.is_initialized():
            dist.barrier()
    except BaseException:
        Path(folder, f"rank {rank}.error").write_text(traceback.format_exc())
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
