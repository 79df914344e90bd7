"""Checkpoints of a run on the GPU, written in the background and loaded again, with the optimizer on either side."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tiny import write_tiny_dataset
from tests.training.commands import metrics, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ON_HOST = ["--use-distributed-optimizer", "--optimizer-cpu-offload"]


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param([], id="plain"),
        pytest.param(["--use-distributed-optimizer"], id="sharded"),
        pytest.param([*ON_HOST, "--overlap-cpu-optimizer-d2h-h2d"], id="optimizer on the host"),
        pytest.param([*ON_HOST, "--optimizer-offload-fraction=0.5"], id="half of it"),
    ],
)
def test_a_run_goes_on_from_its_checkpoint(tmp_path: Path, flags: list[str]) -> None:
    save, first, second = tmp_path / "save", tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    data = f"--data-path={write_tiny_dataset(tmp_path / 'data' / 'tiny')}"
    more = [data, "--bf16", "--train-iters=6", "--lr=1e-3", f"--reference-dir={tmp_path}", *flags]
    train(*more, "--async-save", f"--save={save}", "--save-interval=3", f"--metrics-jsonl={first}")
    (save / "latest_checkpointed_iteration.txt").write_text("3")
    train(*more, f"--load={save}", f"--metrics-jsonl={second}")
    whole, rest = metrics(first), metrics(second)
    assert [step["iteration"] for step in rest] == [4, 5, 6]
    # Attention's backward pass adds up in any order.
    assert [step["loss"] for step in rest] == pytest.approx([step["loss"] for step in whole[3:]], rel=2e-3)
