"""The same run on the GPU and on the CPU of one machine: equal loss curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.tiny import write_tiny_dataset
from tests.training.commands import metrics, train

pytestmark = pytest.mark.gpu

FLAGS = ["--train-iters=10", "--lr=1e-3", "--lambda=0.5", "--transformer-impl=local"]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A random model, and its fp32 run on the CPU."""
    folder = tmp_path_factory.mktemp("gpu")
    data = f"--data-path={write_tiny_dataset(folder / 'data' / 'tiny')}"
    train(data, "--train-iters=1", "--lr=1e-9", "--use-cpu", f"--save={folder / 'start'}")
    flags = [data, *FLAGS, f"--load={folder / 'start'}", "--finetune"]
    train(*flags, "--use-cpu", f"--reference-dir={folder / 'cpu'}", f"--metrics-jsonl={folder / 'cpu.jsonl'}")
    return {"flags": flags, "folder": folder, "cpu": metrics(folder / "cpu.jsonl")}


@pytest.mark.parametrize(("dtype", "relative"), [([], 1e-4), (["--bf16"], 3e-2)], ids=["fp32", "bf16"])
def test_gpu_equals_cpu(start: dict[str, Any], tmp_path: Path, dtype: list[str], relative: float) -> None:
    path = tmp_path / "metrics.jsonl"
    train(*start["flags"], *dtype, f"--reference-dir={tmp_path}", f"--metrics-jsonl={path}")
    steps = metrics(path)
    assert len(steps) == len(start["cpu"]) == 10
    for ours, theirs in zip(steps, start["cpu"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=relative)
        assert ours["longpo/nll_loss"] == pytest.approx(theirs["longpo/nll_loss"], rel=relative)


def test_recompute_changes_nothing_but_memory(start: dict[str, Any], tmp_path: Path) -> None:
    plain, recomputed = tmp_path / "plain.jsonl", tmp_path / "recomputed.jsonl"
    full = ["--recompute-granularity=full", "--recompute-method=uniform", "--recompute-num-layers=1"]
    for path, more in ((plain, []), (recomputed, full)):
        train(*start["flags"], "--bf16", *more, f"--reference-dir={tmp_path}", f"--metrics-jsonl={path}")
    losses = [[step["loss"] for step in metrics(path)] for path in (plain, recomputed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
