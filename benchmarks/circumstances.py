"""When, where and with what a benchmark ran, so that a stored result can be judged later."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil


def circumstances(packages: Sequence[str]) -> dict[str, Any]:
    """Date, machine, versions of Python and of the packages, and the commit, with a + where files were changed."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    command = ["git", "-C", str(Path(__file__).parents[1]), "describe", "--always", "--abbrev=12", "--dirty=+"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "date": datetime.date.today().isoformat(),
        "machine": {
            "processor": names[0] if names else platform.machine(),
            "cores": os.cpu_count(),
            "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
            "system": platform.platform(),
        },
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in packages},
        # A copy may have no history, or that of what it was copied over.
        "commit": os.environ.get("LONGPO_COMMIT") or commit or None,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
