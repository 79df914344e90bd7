"""Where datatrove's and our messages go: a file, and the terminal where a user should know."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from loguru import logger
from tqdm import tqdm

_QUIET_S = 10.0


class _LogFile:
    """A file that takes no more where the disk is full. loguru would print every message it loses with a traceback.

    What matters on a full disk, the answers, stops the run with a message of its own.
    """

    def __init__(self, file: Path) -> None:
        self._file = open(file, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (`stop` closes it)

    def write(self, message: str) -> None:
        """Append a message; loguru calls it."""
        with suppress(OSError):
            self._file.write(message)

    def stop(self) -> None:
        """Close the file; loguru calls it at the end, or when messages go elsewhere."""
        with suppress(OSError):
            self._file.close()


def log_to(file: Path) -> None:
    """Send messages to a file; warnings also to the terminal, above the progress bar, one in ten seconds at most.

    When a server goes down every request in flight warns of it: one line says it all.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    last = -_QUIET_S

    def show(message: Any) -> None:
        nonlocal last
        if time.monotonic() - last >= _QUIET_S:
            last = time.monotonic()
            tqdm.write(f"[{message.record['time']:HH:mm:ss}] {message.record['message']}", file=sys.stderr)

    logger.remove()
    logger.add(_LogFile(file), level="INFO", format="{time:YYYY-MM-DD HH:mm:ss} {level} {message}")
    logger.add(show, level="WARNING")
