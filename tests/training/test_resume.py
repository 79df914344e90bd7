"""Killed, stopped and moved runs go on exactly where they were: real processes, real signals."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

from megatron_longpo.arguments import parse_arguments
from tests.distributed.harness import run_ranks
from tests.tiny import MODEL_FLAGS, write_tiny_dataset
from tests.training.commands import metrics, stop_at_step, train, train_forked

STEPS = 20
FLAGS = [f"--train-iters={STEPS}", "--lr=2e-3", "--lr-decay-style=cosine", "--lambda=0.5", "--save-interval=10"]
COMPARED = ("loss", "grad_norm", "learning_rate", "rewards/margins", "consumed_samples", "longpo/nll_loss")
OPTIMIZERS = {
    "plain": [],
    "distributed": ["--use-distributed-optimizer"],
    "distributed bf16": ["--use-distributed-optimizer", "--bf16"],
}
MORE = [pytest.param(name, marks=pytest.mark.slow) for name in ("plain", "distributed bf16")]
LAYOUTS = {
    "plain": ["--pipeline-model-parallel-size=2"],
    "distributed": ["--tensor-model-parallel-size=2", "--sequence-parallel"],
    "distributed bf16": [],  # DP 2
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"--data-path={write_tiny_dataset(tmp_path_factory.mktemp('data') / 'tiny', num_documents=12)}"


@pytest.fixture(scope="module", params=["distributed", *MORE])
def golden(request: pytest.FixtureRequest, data: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An uninterrupted run of 20 steps."""
    folder = tmp_path_factory.mktemp("golden")
    more = [data, *FLAGS, *OPTIMIZERS[request.param], f"--reference-dir={folder}"]
    train_forked(*more, f"--save={folder / 'save'}", f"--metrics-jsonl={folder / 'metrics.jsonl'}")
    return {"name": request.param, "flags": more, "folder": folder, "steps": metrics(folder / "metrics.jsonl")}


def compared(steps: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [tuple(step[name] for name in ("iteration", *COMPARED)) for step in steps]


def saved_tensors(folder: Path, iteration: int) -> dict[str, torch.Tensor]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        loaded = dist_checkpointing.load_plain_tensors(str(folder / f"iter_{iteration:07d}"))
    finally:
        dist.destroy_process_group()
    return {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}


def checkpoints(folder: Path) -> list[int]:
    """Iterations of the checkpoints in a folder, which has no remains of others."""
    assert not list(folder.glob(".iter_*"))
    return sorted(int(path.name.removeprefix("iter_")) for path in folder.glob("iter_*"))


def test_the_run_learns(golden: dict[str, Any]) -> None:
    steps = golden["steps"]
    assert [step["iteration"] for step in steps] == list(range(1, STEPS + 1))
    first, last = (sum(step["loss"] for step in part) / 5 for part in (steps[:5], steps[-5:]))
    assert last < first - 0.1


def test_killed_run_resumes_bit_equal(golden: dict[str, Any], tmp_path: Path) -> None:
    save, path = tmp_path / "save", tmp_path / "metrics.jsonl"
    flags = [*golden["flags"], f"--save={save}", f"--load={save}", "--save-retain-interval=20"]
    code, _ = stop_at_step(15, path, signal.SIGKILL, *flags)
    assert code == -signal.SIGKILL
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "10"
    train_forked(*flags, f"--metrics-jsonl={path}")
    # Every step once, those of the killed process after its checkpoint replaced, and all of them equal to the last bit.
    assert compared(metrics(path)) == compared(golden["steps"])
    assert checkpoints(save) == [STEPS] and checkpoints(golden["folder"] / "save") == [10, STEPS]
    ours, theirs = (saved_tensors(folder, STEPS) for folder in (save, golden["folder"] / "save"))
    assert ours.keys() == theirs.keys() and any("exp_avg_sq" in name for name in ours)
    assert all((ours[name] == theirs[name]).all() for name in ours)


@pytest.mark.slow
def test_resumes_under_another_layout(golden: dict[str, Any], tmp_path: Path) -> None:
    path, start = tmp_path / "metrics.jsonl", golden["folder"] / "save" / "iter_0000010"
    more = [*LAYOUTS[golden["name"]], f"--load={start}", f"--save={tmp_path / 'save'}", f"--metrics-jsonl={path}"]
    train(*golden["flags"], *more, ranks=2)
    steps = metrics(path)
    assert [step["iteration"] for step in steps] == list(range(11, STEPS + 1))
    tolerance = 2e-2 if "bf16" in golden["name"] else 1e-5
    for ours, theirs in zip(steps, golden["steps"][10:], strict=True):
        for name in COMPARED:
            assert ours[name] == pytest.approx(theirs[name], rel=tolerance, abs=tolerance), (ours["iteration"], name)


def test_sigterm_to_all_processes_saves_and_leaves_with_code_0(data: str, tmp_path: Path) -> None:
    save, path = tmp_path / "save", tmp_path / "metrics.jsonl"
    flags = [data, "--train-iters=5000", "--lr=1e-4", f"--save={save}", "--exit-signal-handler", "--async-save"]
    # What a rank needs to leave in order has been started by then: a reader of data and the manager of the writers.
    helpers = ["--num-workers=1", "--save-interval=2", "--save-retain-interval=4"]
    code, output = stop_at_step(5, path, signal.SIGTERM, *flags, *helpers)
    assert code == 0, output
    last = metrics(path)[-1]["iteration"]
    assert f"leaving after iteration {last}: SIGTERM was received" in output
    assert (save / "latest_checkpointed_iteration.txt").read_text() == str(last)
    assert (save / f"iter_{last:07d}" / "run.yaml").exists()
    assert checkpoints(save) == sorted({*range(4, last + 1, 4), last})


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_says_where_the_run_is_and_how_it_goes_on(data: str, tmp_path: Path, ranks: int) -> None:
    save, path = tmp_path / "save", tmp_path / "metrics.jsonl"
    flags = [data, "--train-iters=5000", f"--save={save}", "--save-interval=4", "--num-workers=1"]
    code, output = stop_at_step(5, path, signal.SIGINT, *flags, f"--load={save}", ranks=ranks)
    (line,) = (line for line in output.splitlines() if "interrupted" in line)
    assert line.startswith("interrupted after iteration ")
    assert line.endswith(" of 5000; the last checkpoint is iteration 4, where the same command goes on")
    # torchrun ends in an exception of its own.
    assert output.count("Traceback") == ranks - 1
    assert code == (130 if ranks == 1 else 1)


@pytest.mark.slow
def test_time_limit_saves_and_leaves(data: str, tmp_path: Path) -> None:
    save = tmp_path / "save"
    limit = "--exit-duration-in-mins=0.001"  # over before the first step
    evaluated = ["--split=50,50", "--eval-interval=1", "--eval-iters=1", f"--metrics-jsonl={save}.jsonl"]
    output = train(data, "--train-iters=100000", f"--save={save}", limit, *evaluated)
    assert "leaving after iteration 1: --exit-duration-in-mins 0.001 have passed; it is saved" in output
    assert (save / "latest_checkpointed_iteration.txt").exists()
    # A scheduler would not wait for it.
    assert not [line for line in metrics(Path(f"{save}.jsonl")) if "eval/loss" in line]


def test_a_step_is_saved_before_it_is_evaluated(data: str, tmp_path: Path) -> None:
    saved = run_ranks(saved_when_evaluated, 1, data, str(tmp_path / "save"))[0]
    assert saved == [["iter_0000001"], ["iter_0000001", "iter_0000002"]]


def saved_when_evaluated(rank: int, data: str, save: str) -> list[list[str]]:
    """What is saved at the moments of evaluation: a step at which the run leaves, and its last one."""
    from megatron_longpo.data.dataset import PreferenceDataset
    from megatron_longpo.training.distributed import initialize
    from megatron_longpo.training.loop import Trainer

    seen: list[list[str]] = []
    saved = Path(save)
    for more in ("--exit-interval=1", f"--load={save}"):
        evaluated = [
            "--split=50,50",
            "--eval-interval=1",
            "--eval-iters=1",
            "--objective=sft-chosen",
            "--num-workers=0",
        ]
        flags = [*MODEL_FLAGS, data, "--train-iters=2", "--progress-bar=off", f"--save={save}", *evaluated, more]
        config = parse_arguments(flags).with_device_defaults("local", "gloo")
        if not seen:
            initialize(config)
        trainer = Trainer(config, PreferenceDataset(config.data.data_path))
        trainer._maybe_evaluate = lambda *_: seen.append(sorted(p.name for p in saved.glob("iter_*")))  # type: ignore
        trainer.train()
    return seen
