"""What the GPU benchmark has measured so far: one file that grows by a measurement at a time and outlives every run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_longpo.files import atomic_writer

Entry = dict[str, Any]


class StoredResults:
    """Measurements by name, on disk after each one; a run that goes on finds them there.

    Args:
        path: The JSON file; made or continued.
        around: Device and versions, which all measurements of a file share, and the commit, which each one notes.
        again: Forget what the file holds.

    Raises:
        ValueError: The file is of another device or of other versions.
    """

    def __init__(self, path: Path, around: Entry, again: bool = False) -> None:
        self.path, self._commit = path, around.get("commit")
        self.around = {name: value for name, value in around.items() if name != "date"}
        self.measured: dict[str, Entry] = {}
        if again or not path.exists():
            return
        stored = json.loads(path.read_text(encoding="utf-8"))
        for name in ("device", "versions"):
            if stored.get(name) != around[name]:
                raise ValueError(
                    f"{path} was measured with {name} {stored.get(name)}, and this machine has {around[name]}: give "
                    "--again to start over, or another --results"
                )
        self.measured = stored["measured"]

    def get(self, name: str) -> Entry | None:
        """A measurement that need not be repeated: one that succeeded, or that ran out of memory."""
        entry = self.measured.get(name)
        return entry if entry is not None and (entry.get("out_of_memory") or "error" not in entry) else None

    def put(self, name: str, entry: Entry) -> None:
        """Add or replace a measurement."""
        self.measured[name] = {**entry, "commit": self._commit}
        self.write({})

    def write(self, summary: Entry) -> None:
        """Write the file.

        Args:
            summary: What follows from the measurements, for readers of the file.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_writer(self.path) as file:
            file.write(json.dumps({**self.around, **summary, "measured": self.measured}, indent=2) + "\n")
