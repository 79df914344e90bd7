"""Measurements in processes of their own, within a limit of time for all of them together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.gpu.results import StoredResults
from benchmarks.step.summary import PYTHONPATH, ROOT

RESULT = "RESULT "
"""Begins the line of a process's output that holds what it measured."""
_MEMORY_SIGNS = ("out of memory", "OutOfMemoryError", "not enough memory")
_KILLED = -9  # by Linux, for want of host memory


class OutOfTime(Exception):
    """The limit is reached; what was measured until now is stored."""


class Measurements:
    """Measures each thing once, in a process of its own, and stores it.

    Args:
        flags: Of every process.
        results: Where measurements are kept.
        minutes: Limit of all of them together; None is none.
    """

    def __init__(self, flags: Sequence[str], results: StoredResults, minutes: float | None = None) -> None:
        self.flags, self.results = list(flags), results
        self._ends_s = None if minutes is None else time.monotonic() + 60 * minutes

    def __call__(self, *words: str) -> dict[str, Any]:
        """The measurement of this name: stored, or made now.

        A process that fails gives an ``error``, and says whether it was for want of memory; the caller goes on.

        Raises:
            OutOfTime: It was not begun, or was ended: the next run repeats it.
        """
        name = " ".join(words)
        stored = self.results.get(name)
        if stored is not None:
            return stored
        entry = in_process([*self.flags, "--measure", *words], self.seconds_left())
        self.results.put(name, entry)
        print(f"{name}: {json.dumps(entry)}", flush=True)
        return self.results.measured[name]

    def seconds_left(self) -> float | None:
        """Time until the limit, or None.

        Raises:
            OutOfTime: There is none.
        """
        if self._ends_s is None:
            return None
        left = self._ends_s - time.monotonic()
        if left <= 0:
            raise OutOfTime
        return left


def in_process(flags: Sequence[str], timeout_s: float | None) -> dict[str, Any]:
    """Run ``python -m benchmarks.gpu`` once more and return what it measured, or an ``error``.

    Raises:
        OutOfTime: It took longer than ``timeout_s``.
    """
    # torch renamed the variable; an old name is still read.
    environment = os.environ | {"PYTHONPATH": PYTHONPATH, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu", *flags],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired as error:
        raise OutOfTime from error
    for line in done.stdout.splitlines():
        if line.startswith(RESULT):
            return json.loads(line.removeprefix(RESULT))
    return failure(done.stderr, done.returncode)


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
