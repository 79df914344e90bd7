"""``--profile`` on the GPU: its trace has the kernels, and the table the device time of every stage."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from megatron_longpo.ranges import COMM, LM_HEAD, MLP, OPTIMIZER, PREFIX_ATTENTION
from tests.tiny import write_tiny_dataset
from tests.training.commands import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_stages_have_device_time(tmp_path: Path) -> None:
    data = f"--data-path={write_tiny_dataset(tmp_path / 'data' / 'tiny')}"
    steps = ["--profile-step-start=2", "--profile-step-end=4"]
    flags = [data, "--bf16", "--train-iters=4", f"--reference-dir={tmp_path}"]
    output = train(*flags, "--profile", *steps, f"--profile-dir={tmp_path}")
    (path,) = tmp_path.glob("*.pt.trace.json")
    events = json.loads(path.read_text())["traceEvents"]
    kernels = [event for event in events if event.get("cat") == "kernel"]
    assert kernels
    rows = re.findall(r"^(\S.*?)\s+(-?\d+\.\d{3})\s+(-?[\d.]+)%$", output, re.MULTILINE)
    shares = {name: float(share) for name, _, share in rows}
    for stage in (PREFIX_ATTENTION, MLP, LM_HEAD, OPTIMIZER):
        assert shares[stage] > 0, output
    assert all(share >= 0 for share in shares.values()), output
    # Stages are disjoint and hold every kernel, once; copies between memories are in the table too.
    in_kernels = sum(event["dur"] for event in kernels) / 1e6
    assert sum(float(seconds) for _, seconds, _ in rows) == pytest.approx(in_kernels, rel=0.2, abs=5e-3), output
    assert COMM in shares
