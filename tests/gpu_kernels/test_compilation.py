"""The kernels compile for Ampere, Hopper and Blackwell, and read memory 16 bytes at a time; needs Triton and no GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.training.commands import REPOSITORY, environment

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="could not import 'triton'")


def test_every_kernel_compiles_and_reads_16_bytes_at_a_time() -> None:
    clean = {name: value for name, value in environment().items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu_kernels.compilation"],
        cwd=REPOSITORY,
        env=clean | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), clean.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 5 * 3
    for name, architecture, loads, wide in found:
        assert wide > 0 and loads - wide <= 2, (name, architecture, loads, wide)
