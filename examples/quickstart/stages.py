"""Stages that run once: each leaves a stamp of what it was made from, and is skipped while that has not changed.

A stamp is the SHA-256 of the stage's settings, of its own source code and of every file it reads. Change a setting, a
line of a stage or an earlier stage's output, and exactly the stages behind it run again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Stage:
    """One step of the quickstart.

    Args:
        name: Short name; also the stamp's file name.
        purpose: One line for the reader: what the stage makes, and from what.
        run: Does the work.
        inputs: Files and folders it reads, its own source code included.
        outputs: Files and folders it leaves behind.
        settings: Everything else that its result depends on; must be JSON.
    """

    name: str
    purpose: str
    run: Callable[[], None]
    inputs: tuple[Path, ...]
    outputs: tuple[Path, ...]
    settings: dict[str, Any] = field(default_factory=dict)

    def digest(self) -> str:
        """SHA-256 of settings and inputs, hex."""
        whole = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode())
        for file in _files(self.inputs):
            whole.update(file.as_posix().encode())
            whole.update(hashlib.sha256(file.read_bytes()).digest())
        return whole.hexdigest()


def run_stages(stages: list[Stage], stamps: Path) -> dict[str, float]:
    """Run every stage whose inputs changed or whose outputs are missing.

    Args:
        stages: In order; a later stage may read what an earlier one writes.
        stamps: Folder of the stamp files.

    Returns:
        Seconds that each stage took; 0 for a skipped one.
    """
    stamps.mkdir(parents=True, exist_ok=True)
    seconds = {}
    for number, stage in enumerate(stages, 1):
        heading = f"[{number}/{len(stages)}] {stage.name}"
        stamp = stamps / f"{stage.name}.sha256"
        digest = stage.digest()
        if stamp.exists() and stamp.read_text() == digest and all(output.exists() for output in stage.outputs):
            print(f"{heading}: already done", flush=True)
            seconds[stage.name] = 0.0
            continue
        # Removed first: a stage that is killed half-way must not pass for done.
        stamp.unlink(missing_ok=True)
        print(f"{heading}: {stage.purpose}", flush=True)
        started = time.monotonic()
        stage.run()
        seconds[stage.name] = time.monotonic() - started
        if missing := [str(output) for output in stage.outputs if not output.exists()]:
            raise RuntimeError(f"stage {stage.name} ended without writing {', '.join(missing)}")
        stamp.write_text(digest)
    return seconds


def _files(paths: Iterable[Path]) -> Iterable[Path]:
    """Every file at or under the paths, in a fixed order; compiled Python is not an input."""
    for path in paths:
        if path.is_dir():
            yield from sorted(f for f in path.rglob("*") if f.is_file() and "__pycache__" not in f.parts)
        else:
            yield path
