"""The same run on the GPU and on the CPU of one machine: equal loss curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import write_tiny_dataset
from tests.training.commands import metrics, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

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


FULL = ["--recompute-granularity=full", "--recompute-method=uniform", "--recompute-num-layers=1"]
OFFLOAD = ["--cpu-offloading-num-layers=4"]
PIECES = ["--mlp-chunk-tokens=64", "--projection-chunk-tokens=64"]


@pytest.fixture(scope="module")
def plain(start: dict[str, Any]) -> list[float]:
    """The losses of bf16 without anything that saves memory."""
    path = start["folder"] / "plain.jsonl"
    train(*start["flags"], "--bf16", f"--reference-dir={start['folder'] / 'bf16'}", f"--metrics-jsonl={path}")
    return [step["loss"] for step in metrics(path)]


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(FULL, id="full recompute"),
        pytest.param([*FULL, "--recompute-keep-attention"], id="attention kept"),
        pytest.param(OFFLOAD, id="offload"),
        pytest.param([*FULL, "--recompute-keep-attention", *OFFLOAD, *PIECES], id="all together"),
        pytest.param(["--use-distributed-optimizer", "--optimizer-cpu-offload"], id="optimizer offload"),
    ],
)
def test_what_saves_memory_changes_nothing_else(
    start: dict[str, Any], plain: list[float], tmp_path: Path, flags: list[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    train(*start["flags"], "--bf16", *flags, f"--reference-dir={tmp_path}", f"--metrics-jsonl={path}")
    assert [step["loss"] for step in metrics(path)] == pytest.approx(plain, rel=5e-3)
