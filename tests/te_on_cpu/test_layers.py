"""Layers, optimizer and checkpoints with Transformer Engine's own Python code, over formulas for its kernels."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.harness import run_ranks
from tests.distributed.one_step import run_all, save_model_and_run_all
from tests.distributed.test_layouts import COMMON, FULL, KEPT, LAYOUTS, MODEL, OBJECTIVES, PIECES, ZERO, load_tensors
from tests.te_on_cpu import FOLDER, environment
from tests.tiny import write_tiny_dataset
from tests.training.commands import metrics, stop_at_step, train
from tests.training.test_resume import compared, saved_tensors

TE = "--transformer-impl=transformer_engine"
FP8 = ["--bf16", "--fp8-format=hybrid"]
# Blocks of 16 rows and columns for fp8, also on two tensor-parallel ranks.
_SIZES = {"--hidden-size=32": "--hidden-size=64", "--ffn-hidden-size=48": "--ffn-hidden-size=96"}
WIDE = [_SIZES.get(flag, flag) for flag in MODEL]

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no wheel of transformer-engine in {FOLDER}: make install")


@pytest.fixture
def with_te(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that are started find Transformer Engine."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)


def steps(folder: Path, one: dict[str, list[str]], four: dict[str, list[str]]) -> dict[str, tuple[dict, dict]]:
    """Metrics and gradients of a batch, or what `one_step` makes of names that end in "step", in 1 and 4 processes."""
    data = str(write_tiny_dataset(folder / "data" / "tiny", num_documents=20))
    start = [*WIDE, *COMMON, f"--load={folder / 'start'}", *OBJECTIVES["longpo"]]
    places = {name: f"{folder / str(n)}{'-step' * name.endswith('step')}" for n, name in enumerate(one | four)}

    def cases(named: dict[str, list[str]]) -> list[tuple[list[str], str, str]]:
        return [([*start, *flags], data, places[name]) for name, flags in named.items()]

    found = run_ranks(save_model_and_run_all, 1, cases(one), str(folder), WIDE)[0]
    # Transformer Engine has one state of fp8 for a process, with the groups of its first model.
    batches = [[case] for case in cases(four)] if "--fp8" in str(four) else [cases(four)] if four else []
    for number, batch in enumerate(batches):
        world = folder / f"world-{number}"
        world.mkdir()
        found += run_ranks(run_all, 4, batch, str(world))[0]
    tensors = load_tensors(places)
    return {name: (metrics, tensors[name]) for name, (metrics, _) in zip(places, found, strict=True)}


def assert_equal(ours: tuple[dict, dict], theirs: tuple[dict, dict], tolerance: float = 0.0) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=tolerance, abs=tolerance)
    assert ours[1].keys() == theirs[1].keys()
    for name, tensor in theirs[1].items():
        assert (ours[1][name] - tensor).abs().max() <= tolerance * tensor.abs().max(), name


@pytest.mark.slow
def test_layers_equal_those_of_megatron_core(with_te: None, tmp_path: Path) -> None:
    found = steps(tmp_path, {"local": ["--bf16"], "te": [TE, "--bf16"], "fp8": [TE, *FP8]}, {})
    assert_equal(found["te"], found["local"])
    exact, rounded = found["local"][0], found["fp8"][0]
    assert exact["longpo/nll_loss"] != rounded["longpo/nll_loss"] == pytest.approx(exact["longpo/nll_loss"], rel=0.02)
    # What is not differentiated is in bf16, the reference too.
    evaluated = [name for name in exact if name.startswith("eval/")]
    assert evaluated and all(exact[name] == rounded[name] for name in evaluated)


@pytest.mark.slow
def test_saving_memory_changes_nothing(with_te: None, tmp_path: Path) -> None:
    saving = ["--bf16", *KEPT, *PIECES, "--cpu-offloading-num-layers=2"]
    both = {"local": saving, "te": [TE, *saving]}
    found = steps(tmp_path, both | {"fp8": [TE, *FP8], "fp8, recomputed": [TE, *FP8, *FULL]}, {})
    assert_equal(found["te"], found["local"])
    assert_equal(found["fp8, recomputed"], found["fp8"])


@pytest.mark.slow
def test_layouts_equal_one_process_of_megatron_core(with_te: None, tmp_path: Path) -> None:
    names = ["TP 2 + sequence parallel", "TP 2 + sequence parallel + in pieces", "TP 2 + full recompute"]
    names += ["interleaved PP 2 + attention kept", "CP 2 ring + attention kept", "TP 2 x CP 2"]
    sharded = {f"{name} step": [TE, "--use-distributed-optimizer", *ZERO[name]] for name in ("DP 4", "overlapped")}
    sharded["TP 2 step"] = [TE, *LAYOUTS["TP 2 + sequence parallel"]]
    layouts = {name: [TE, *LAYOUTS[name]] for name in names}
    found = steps(tmp_path, {"local": [], "local step": []}, layouts | sharded)
    for name in names:
        assert_equal(found[name], found["local"], 1e-5)
    for name in sharded:
        assert_equal(found[name], found["local step"], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
def test_fp8_in_layouts(with_te: None, tmp_path: Path, recipe: str) -> None:
    fp8 = [TE, *FP8, f"--fp8-recipe={recipe}"]
    layouts = {name: [*fp8, *LAYOUTS[name]] for name in ("TP 2 + sequence parallel", "TP 2 x PP 2", "TP 2 x CP 2")}
    layouts["PP 2, recomputed"] = [*fp8, *LAYOUTS["PP 2"], *FULL]
    layouts["sharded"] = [*fp8, "--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
    found = steps(tmp_path, {"one": fp8}, layouts)
    for name in layouts:
        # Every rank rounds its own part, with factors of earlier rows, which are others.
        assert found[name][0]["longpo/nll_loss"] == pytest.approx(found["one"][0]["longpo/nll_loss"], rel=0.02), name
        ours, theirs = (torch.cat([t.flatten() for _, t in sorted(found[n][1].items())]) for n in (name, "one"))
        assert name == "sharded" or torch.cosine_similarity(ours.float(), theirs.float(), dim=0) > 0.9, name


RUN = ["--train-iters=8", "--lr=2e-3", "--save-interval=4", "--lambda=0.5", "--ffn-hidden-size=96", "--hidden-size=64"]


@pytest.fixture
def data(tmp_path: Path) -> str:
    return f"--data-path={write_tiny_dataset(tmp_path / 'tiny', num_documents=12)}"


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--bf16", "--use-distributed-optimizer"], FP8, []], ids=["bf16", "fp8", "fp32"])
def test_a_killed_run_resumes_bit_equal(with_te: None, data: str, tmp_path: Path, more: list[str]) -> None:
    flags = [data, TE, *RUN, *more, f"--reference-dir={tmp_path}"]
    train(*flags, f"--save={tmp_path / 'whole'}", f"--metrics-jsonl={tmp_path / 'whole.jsonl'}")
    save, path = tmp_path / "save", tmp_path / "metrics.jsonl"
    stop_at_step(6, path, signal.SIGKILL, *flags, f"--save={save}")
    train(*flags, f"--save={save}", f"--load={save}", f"--metrics-jsonl={path}")
    assert compared(metrics(path)) == compared(metrics(tmp_path / "whole.jsonl"))
    ours, theirs = saved_tensors(save, 8), saved_tensors(tmp_path / "whole", 8)
    assert ours.keys() == theirs.keys() and any("exp_avg_sq" in name for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_evaluation_leaves_an_fp8_run_as_it_is(with_te: None, data: str, tmp_path: Path) -> None:
    found = []
    for number, more in enumerate([["--eval-iters=0"], ["--eval-iters=1", "--eval-interval=2"]]):
        path = tmp_path / f"{number}.jsonl"
        flags = [data, TE, *FP8, *RUN, *more, f"--metrics-jsonl={path}", f"--reference-dir={tmp_path}"]
        train(*flags, f"--save={tmp_path / str(number)}")
        found.append(compared([step for step in metrics(path) if "loss" in step]))
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.parametrize("impls", [("local", "transformer_engine"), ("transformer_engine", "local")], ids="-to-".join)
def test_a_run_goes_on_with_the_other_layers(with_te: None, data: str, tmp_path: Path, impls: tuple[str, str]) -> None:
    flags = [data, *RUN, "--bf16", "--use-distributed-optimizer", "--qk-layernorm", f"--reference-dir={tmp_path}"]
    save, found = tmp_path / "save", {}
    for name, impl, load in [("whole", impls[0], None), ("moved", impls[1], save / "iter_0000004")]:
        more = [f"--save={save}"] if load is None else [f"--load={load}", f"--save={tmp_path / 'moved'}"]
        path = tmp_path / f"{name}.jsonl"
        train(*flags, f"--transformer-impl={impl}", *more, f"--metrics-jsonl={path}")
        found[name] = metrics(path)
    assert [step["iteration"] for step in found["moved"]] == [5, 6, 7, 8]
    for ours, theirs in zip(compared(found["moved"]), compared(found["whole"])[4:], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
        assert all(math.isfinite(value) for value in ours)


@pytest.mark.slow
def test_the_optimizer_on_the_host_resumes_with_its_own_adam(with_te: None) -> None:
    root = Path(__file__).parents[2]
    file = root / "tests" / "training" / "test_optimizer_offload.py"
    command: list[Any] = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider", file]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-6000:]
