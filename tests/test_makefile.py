"""The Makefile's GPU tests are all of them, and run where everything is installed already."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_file_with_gpu_tests_is_named() -> None:
    named = re.search(r"^GPU_TESTS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert named is not None
    places = [ROOT / place for place in named[1].split()]
    assert all(place.exists() for place in places)
    marked = {p for p in (ROOT / "tests").rglob("test_*.py") if re.search(r"\bmark\.gpu\b", p.read_text())}
    marked.discard(Path(__file__))
    assert len(marked) >= 5
    assert not [p for p in marked if not any(place in (p, *p.parents) for place in places)]


def test_nothing_is_installed_where_it_is_said_to_be() -> None:
    command = ["make", "-n", "test-gpu", f"RUN={sys.executable}", "INSTALLED="]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "install.sh" not in done.stdout and f"{sys.executable} -m pytest -m gpu" in done.stdout
