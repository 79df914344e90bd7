"""What a task has done so far: answers of unfinished documents, outcomes of finished ones, in one SQLite file.

It is datatrove's request cache with two changes. Commits are shared by all that is waiting, so that the disk's latency
does not limit the requests per second. And the outcome of a document enters in the transaction that removes its
requests: a process that is killed at any moment leaves a document either finished or with the answers it had.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import orjson
from datatrove.pipeline.inference.checkpointing import RequestCache

from megatron_longpo.generation.rollout import Outcome
from megatron_longpo.pair_formats.raw import GENERATION_STATE

STATE = GENERATION_STATE
"""Folder inside of ``--output`` with the state of a run."""

_OUTCOMES = """
CREATE TABLE IF NOT EXISTS outcomes (
    doc_index INTEGER PRIMARY KEY, doc_id TEXT NOT NULL, outcome BLOB NOT NULL, seconds REAL NOT NULL
)
"""
_PRAGMAS = ("locking_mode = EXCLUSIVE", "journal_mode = WAL", "synchronous = NORMAL")
"""A commit is safe from a kill without waiting for the disk, and from a power cut once the log has been synced. With
the lock held for good the log needs no shared memory, which network file systems lack."""

_ADD_REQUEST = (
    "INSERT OR REPLACE INTO request_cache (chunk_index, doc_id, rollout_idx, payload_hash, result, error_message) "
    "VALUES (?, ?, ?, ?, ?, ?)"
)


def task_folder(output: str, task: int) -> Path:
    """Where a task keeps its state; datatrove's name."""
    return Path(output, STATE, f"{task:05d}")


def store_file(output: str, task: int) -> Path:
    """The database of a task; datatrove's name."""
    return task_folder(output, task) / "replay.sqlite3"


def finished_mark(output: str, task: int) -> Path:
    """An empty file that says that a task has come to its end."""
    return task_folder(output, task) / "finished"


class TaskStore(RequestCache):
    """The state of one task."""

    def __init__(self, work: Path) -> None:
        super().__init__(str(work))
        self.finished: set[str] = set()

    async def initialize(self, rank: int) -> None:
        """Open the database, or make it; `finished` then holds the ids of finished documents."""
        try:
            await self._open(rank)
        except sqlite3.Error:
            await self.close()  # aiosqlite's thread would keep the process from ending
            raise

    async def _open(self, rank: int) -> None:
        await super().initialize(rank)
        assert self._conn is not None
        for pragma in _PRAGMAS:
            await self._conn.execute(f"PRAGMA {pragma}")
        await self._conn.execute(_OUTCOMES)
        await self._conn.commit()
        async with self._conn.execute("SELECT doc_id FROM outcomes") as rows:
            self.finished = {row[0] async for row in rows}

    async def close(self, delete_file: bool = False) -> None:
        """Write what is waiting and close the database, which stays: it holds the outcomes."""
        await super().close(delete_file=False)

    async def store_outcome(self, outcome: Outcome, seconds: float) -> None:
        """Returns when the outcome is on disk.

        Raises:
            OSError: It could not be written.
        """
        assert self._queue is not None
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        row = (outcome.index, outcome.id, orjson.dumps(outcome.to_dict()), seconds)
        await self._queue.put(("outcome", (row, written)))
        await written

    async def _writer_loop(self) -> None:
        assert self._queue is not None
        is_last = False
        while not is_last:
            operations = [await self._queue.get()]
            while not self._queue.empty():
                operations.append(self._queue.get_nowait())
            is_last = None in operations
            waiting = [data[1] for kind, data in filter(None, operations) if kind == "outcome"]
            lost: OSError | None = None
            try:
                await self._write(operations)
            except sqlite3.Error as error:
                # Answers that are not kept cost time after an interruption. An outcome that is not kept would be lost.
                lost = OSError(f"{self.db_path} cannot be written: {error}")
            for future in waiting:
                if future.done():  # cancelled by Ctrl-C
                    continue
                if lost:
                    future.set_exception(lost)
                else:
                    future.set_result(None)
            for _ in operations:
                self._queue.task_done()

    async def _write(self, operations: list[Any]) -> None:
        assert self._conn is not None
        requests: list[tuple[Any, ...]] = []
        outcomes: list[tuple[Any, ...]] = []
        for kind, data in filter(None, operations):
            if kind == "outcome":
                outcomes.append(data[0])
            elif kind == "result":
                *key, result = data
                requests.append((*key, orjson.dumps(result), None))
            else:
                *key, message = data
                requests.append((*key, None, message))
        if requests:
            await self._conn.executemany(_ADD_REQUEST, requests)
        if outcomes:
            await self._conn.executemany("INSERT OR REPLACE INTO outcomes VALUES (?, ?, ?, ?)", outcomes)
            ids = [(row[1],) for row in outcomes]
            await self._conn.executemany("DELETE FROM request_cache WHERE doc_id = ?", ids)
        await self._conn.commit()


class StoredOutcomes:
    """Takes the place of datatrove's checkpoint manager, whose files a kill can tear in the middle of a line.

    Documents count as one chunk that is never complete; `PairsRunner` leaves finished ones out itself.
    """

    def __init__(self, store: TaskStore) -> None:
        self._store = store

    async def parse_existing_checkpoints(self, rank: int, writer: Any) -> tuple[int, set[str]]:
        """Nothing to skip by number, nothing to copy."""
        return 0, set()

    def chunk_index_gen(self) -> Iterator[int]:
        """Every document belongs to chunk 0."""
        while True:
            yield 0

    async def cleanup_last_chunk(self, rank: int, chunk_index: int) -> None:
        """Nothing is left to clean up."""


@contextmanager
def damage_named(file: Path) -> Iterator[None]:
    """Raise ValueError with the database's name and the fix for what SQLite has to say of it in the block."""
    try:
        yield
    except sqlite3.Error as error:
        raise ValueError(
            f"{file} cannot be used ({error}): if it is damaged, delete {file.parent}, and the same command asks for "
            "what was in it again"
        ) from error


def read_outcomes(file: Path) -> Iterator[tuple[Outcome, float]]:
    """The outcomes of a task by rising index, with the seconds that each took.

    Raises:
        ValueError: The database is damaged.
    """
    address = f"{file.absolute().as_uri()}?mode=rw"  # so that it is not made where it is missing
    with damage_named(file), closing(sqlite3.connect(address, uri=True)) as connection:
        connection.execute(f"PRAGMA {_PRAGMAS[0]}")
        for blob, seconds in connection.execute("SELECT outcome, seconds FROM outcomes ORDER BY doc_index"):
            yield Outcome.from_dict(json.loads(blob)), seconds
