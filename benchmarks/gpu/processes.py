"""Measurements in processes of their own, within a limit of time for all of them together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.gpu.results import StoredResults
from benchmarks.step.summary import PYTHONPATH, ROOT

RESULT = "RESULT "
"""Begins the line of a process's output that holds what it measured."""
_NUM_WAITING = min(max((os.cpu_count() or 1) // 4, 1), 4)
"""Processes that import everything while another one measures: a GPU's time is dear, and imports take seconds."""
_MEMORY_SIGNS = ("out of memory", "OutOfMemoryError", "not enough memory")
_KILLED = -9  # by Linux, for want of host memory


class OutOfTime(Exception):
    """The limit is reached; what was measured until now is stored."""


class Workers:
    """Processes of ``python -m benchmarks.gpu``, each for one measurement.

    Args:
        flags: Of every process.
        folder: Where they write.
        num_threads: Of PyTorch in each.
    """

    def __init__(self, flags: Sequence[str], folder: Path, num_threads: int) -> None:
        self._command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu", *flags, f"--work={folder}"]
        self._environment = os.environ | {
            "PYTHONPATH": PYTHONPATH,
            "OMP_NUM_THREADS": str(num_threads),
            # torch renamed the variable; an old name is still read.
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
            "HF_HOME": str(folder / "huggingface"),
            "HF_HUB_OFFLINE": "1",
        }
        self._waiting = deque(self._start() for _ in range(_NUM_WAITING))

    def measure(self, words: Sequence[str], timeout_s: float | None) -> dict[str, Any]:
        """What a process finds of the name that the words are, or an ``error``.

        Raises:
            OutOfTime: It took longer than ``timeout_s``.
        """
        process = self._waiting.popleft()
        self._waiting.append(self._start())
        try:
            stdout, stderr = process.communicate(json.dumps(words), timeout=timeout_s)
        except BaseException as error:
            _end(process)
            if isinstance(error, subprocess.TimeoutExpired):
                raise OutOfTime from error
            raise
        for line in stdout.splitlines():
            if line.startswith(RESULT):
                return json.loads(line.removeprefix(RESULT))
        return failure(stderr, process.returncode)

    def close(self) -> None:
        """End those that wait."""
        for process in self._waiting:
            _end(process)

    def _start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self._command,
            cwd=ROOT,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


@contextmanager
def workers(flags: Sequence[str], folder: Path, num_threads: int) -> Iterator[Workers]:
    """`Workers` that leave no process behind."""
    opened = Workers(flags, folder, num_threads)
    try:
        yield opened
    finally:
        opened.close()


class Measurements:
    """Measures each thing once and stores it.

    Args:
        workers: Who measures.
        results: Where measurements are kept.
        minutes: Limit of all of them together; None is none.
    """

    def __init__(self, workers: Workers, results: StoredResults, minutes: float | None = None) -> None:
        self.workers, self.results = workers, results
        self._ends_s = None if minutes is None else time.monotonic() + 60 * minutes

    def __call__(self, *words: str) -> dict[str, Any]:
        """The measurement of this name: stored, or made now.

        A process that fails gives an ``error``, and says whether it was for want of memory; the caller goes on.

        Raises:
            OutOfTime: It was not begun, or was ended: the next run repeats it.
        """
        name = name_of(*words)
        stored = self.results.get(name)
        if stored is not None:
            return stored
        began = time.monotonic()
        entry = self.workers.measure(words, self._seconds_left())
        self.results.put(name, entry)
        print(f"{name} ({time.monotonic() - began:.0f} s): {_brief(entry)}", flush=True)
        return self.results.measured[name]

    def _seconds_left(self) -> float | None:
        if self._ends_s is None:
            return None
        left = self._ends_s - time.monotonic()
        if left <= 0:
            raise OutOfTime
        return left


def name_of(*words: str) -> str:
    """What results call the measurement of these words, each of which may have spaces."""
    return " | ".join(words)


def _brief(entry: dict[str, Any]) -> str:
    return json.dumps({name: value for name, value in entry.items() if name != "stderr"})


def failure(text: str, code: int) -> dict[str, Any]:
    """The entry of a process that failed.

    Args:
        text: What it wrote to stderr.
        code: Its exit code.
    """
    lines = text.strip().splitlines()
    # Without torchrun every line of a traceback begins with the rank, and notes may follow the exception.
    errors = [line for line in lines if "Error: " in line or line.rstrip().endswith("Error")]
    last = (errors or lines or [f"exit code {code}"])[-1].removeprefix("[rank0]: ")
    return {
        "error": f"exit code {code}: {last}",
        "out_of_memory": code == _KILLED or any(sign in text for sign in _MEMORY_SIGNS),
        "stderr": lines[-30:],
    }
