"""The GPU benchmark on a CPU: it stores and resumes, goes on after failures, and (slow) runs from end to end."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from benchmarks.gpu import parts
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.processes import Measurements, OutOfTime, failure, name_of, workers
from benchmarks.gpu.results import StoredResults
from benchmarks.gpu.settings import REAL, TINY
from benchmarks.gpu.summary import summary, table
from benchmarks.step.case import StepCase
from megatron_longpo.arguments import parse_arguments
from tests.training.commands import REPOSITORY, environment

AROUND = {"device": {"name": "H100"}, "versions": {"torch": "2.13"}, "commit": "abc", "date": "today"}
OUT_OF_MEMORY = {"error": "CUDA out of memory", "out_of_memory": True}
BROKEN = {"error": "KeyError: 'x'", "out_of_memory": False}


class Answers:
    """Measurements that a function makes up; none is stored."""

    def __init__(self, answer: Callable[..., dict[str, Any]]) -> None:
        self.answer = answer
        self.results = SimpleNamespace(measured={})

    def __call__(self, *words: str) -> dict[str, Any]:
        return self.answer(*words)


def test_documents_grow_until_one_does_not_fit() -> None:
    settings = dataclasses.replace(TINY, first_length=64, length_limit=4096)
    asked: list[int] = []

    def measure(kind: str, shape: str, saving: str, length: str, backend: str) -> dict[str, Any]:
        assert (kind, shape, saving, backend) == ("fits", "tiny", "kept", "flash")
        asked.append(int(length))
        return {} if int(length) <= 80 else OUT_OF_MEMORY

    parts.longest(settings, Answers(measure))
    assert asked == [64, 72, 80, 88]
    measured = {name_of("fits", "tiny", "kept", str(n), "flash"): {} if n <= 80 else OUT_OF_MEMORY for n in asked}
    (found,) = summary(settings, measured, 1.0, "CPU")["longest"]
    assert (found["fits_tokens"], found["fails_tokens"]) == (80, 88)


def test_a_rival_that_does_not_fit_is_not_tried_on_longer_documents() -> None:
    settings = dataclasses.replace(TINY, rival_lengths=(64, 128, 256))
    asked: list[tuple[str, str]] = []

    def measure(_: str, variant: str, length: str, *rest: str) -> dict[str, Any]:
        asked.append((variant, length))
        return OUT_OF_MEMORY if (variant, length) == ("trl", "128") else {}

    parts.rivals(settings, Answers(measure))
    assert [length for variant, length in asked if variant == "trl"] == ["64", "128"]
    assert [length for variant, length in asked if variant == "shared_prefix"] == ["64", "128", "256"]


def test_measurements_are_stored_one_by_one_and_only_mistakes_are_repeated(
    tmp_path: Path,
) -> None:
    answers: dict[str, dict[str, Any]] = {"good": {"x": 1}, "large": OUT_OF_MEMORY, "broken": BROKEN}
    asked: list[str] = []

    def answer(words: tuple[str, ...], timeout_s: float | None) -> dict[str, Any]:
        asked.extend(words)
        return answers[words[0]]

    path = tmp_path / "results" / "gpu.json"
    for number in range(2):
        results = StoredResults(path, {**AROUND, "commit": f"commit {number}"})
        measure = Measurements(SimpleNamespace(measure=answer), results)
        for name in answers:
            measure(name)
            assert name in json.loads(path.read_text())["measured"]
    assert asked == ["good", "large", "broken", "broken"]
    stored = json.loads(path.read_text())["measured"]
    assert stored["good"]["commit"] == "commit 0" and stored["broken"]["commit"] == "commit 1"
    with pytest.raises(ValueError, match=r"was measured with device .*H100.* give --again"):
        StoredResults(path, {**AROUND, "device": {"name": "H200"}})
    assert not StoredResults(path, {**AROUND, "device": {"name": "H200"}}, again=True).measured


def test_a_limit_of_time_ends_what_runs_and_stores_nothing_of_it(tmp_path: Path) -> None:
    began, others = time.monotonic(), psutil.Process().children()
    with workers(["--device=cpu", "--tiny"], tmp_path, 1) as processes:
        measure = Measurements(processes, StoredResults(tmp_path / "gpu.json", AROUND), minutes=0.5 / 60)
        for _ in range(2):
            with pytest.raises(OutOfTime):
                measure("matmul")
    assert time.monotonic() - began < 10
    assert not (tmp_path / "gpu.json").exists()
    assert psutil.Process().children() == others


@pytest.mark.parametrize(
    ("text", "code", "out_of_memory", "error"),
    [
        (
            "Traceback\n[rank0]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\nnote: see docs",
            1,
            True,
            "exit code 1: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB",
        ),
        ("", -9, True, "exit code -9: exit code -9"),
        ("Traceback\nKeyError: 'x'\n", 1, False, "exit code 1: KeyError: 'x'"),
        ("torch.AcceleratorError: CUDA error: an illegal memory access", 1, False, "exit code 1: torch.Acc"),
    ],
)
def test_a_failed_process_says_why_and_whether_it_was_memory(
    text: str, code: int, out_of_memory: bool, error: str
) -> None:
    entry = failure(text, code)
    assert entry["out_of_memory"] is out_of_memory and entry["error"].startswith(error)


def test_a_mistake_in_one_measurement_leaves_the_others_in_the_summary() -> None:
    good = {"prefix_tokens": 64, "matmul_flops": 4e12, "attention_flops": 6e12, "step_s": 0.1, "peak_memory_gib": 3.0}
    measured = {
        "matmul": {"tflops": 200.0},
        **{name_of("errors", "bfloat16", name): {"relative_error": 1e-3} for name in parts.BACKENDS},
        "attention | flash": {"both": 60.0},
        "attention | fused": {"both": 100.0},
        "speed | tiny | none | 64 | fused": {**good, "tokens_per_s": 640.0, "pinned_memory_gib": 0.5},
        "memory | tiny | none | 64": {"peak_memory_gib": 2.0},
        "speed | tiny | kept, pieces, offload | 128 | fused": BROKEN,
        "lengths | tiny | none | 64 | fused": {"prefix_tokens": [50, 60], "new_over_seen": 1.5},
    }
    found = summary(TINY, measured, 1000.0, "CPU")
    second, first = found["speed"]
    assert (first["mfu"], first["time_over_possible"]) == pytest.approx((0.1, 1.25))
    assert first["memory_over_dry_run"] == 1.5
    assert second == {"shape": "tiny", "saving": "kept, pieces, offload", "prefix_tokens": 128, **BROKEN}
    text = table(AROUND, found)
    assert "| tiny | none | 64 | 640 | 10.0% | 1.25x |  | 3.0 | 1.50x | 0.5 |" in text
    assert "| tiny | kept, pieces, offload | 128 | failed |" in text
    assert (
        "2 documents of 50 to 60 tokens, tiny with none: the first time each took 1.50x as long as the second" in text
    )
    assert "`--attention-backend fused`, the fastest that was exact. Rates: matrix products 200 TFLOP/s" in text
    del measured["matmul"]
    assert "time_over_possible" not in summary(TINY, measured, 1000.0, "CPU")["speed"][1]


def test_the_fastest_kernel_that_is_exact_trains() -> None:
    exact = {"relative_error": 1e-3}
    rates = {"attention | flash": {"both": 300.0}, "attention | fused": {"both": 500.0}}
    assert parts.fastest_backend({}) == "flash"
    assert (
        parts.fastest_backend({**rates, "errors | bfloat16 | flash": exact, "errors | bfloat16 | fused": exact})
        == "fused"
    )
    assert (
        parts.fastest_backend({**rates, "errors | bfloat16 | flash": exact, "errors | bfloat16 | fused": BROKEN})
        == "flash"
    )


def test_the_real_settings_are_flags_that_the_trainer_takes() -> None:
    for case in REAL.shapes.values():
        case.check()
    for flags in REAL.savings.values():
        parse_arguments(list(flags))
    asked = {(shape, saving) for shape, saving, _ in parts.timed_steps(REAL)} | set(REAL.longest)
    assert {shape for shape, _ in asked} == set(REAL.shapes) and {saving for _, saving in asked} == set(REAL.savings)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device=cpu"], "--device cpu is for --tiny"),
        (["--device=cpu", "--tiny"], "the peak of 'CPU' is not known: give --peak-tflops"),
        (["--tabulate=README.md"], "--tabulate README.md is not what this program writes: give its gpu.json"),
        (["--tabulate=benchmarks/results/step_cpu.json"], "step_cpu.json is not what this program writes"),
    ],
)
def test_what_cannot_be_measured_is_said(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LONGPO_USE_CPU", "1")
    monkeypatch.chdir(REPOSITORY)
    assert main(flags) == 1
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_runs_from_end_to_end_and_goes_on(tmp_path: Path) -> None:
    def run(*flags: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--device=cpu", "--peak-tflops=1", *flags],
            cwd=REPOSITORY,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )

    results = f"--results={tmp_path}"
    done = run(results, "--minutes=0.5")
    assert done.returncode == 3 and "the time is over" in done.stdout, done.stderr[-4000:]
    before = json.loads((tmp_path / "gpu.json").read_text())["measured"]
    done = run(results)
    assert done.returncode == 0, done.stderr[-4000:]
    assert {path.name for path in tmp_path.iterdir()} == {"gpu.json", "step_cpu.json"}
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert before and before.items() <= result["measured"].items()
    assert not [entry for entry in result["measured"].values() if "error" in entry]
    assert [entry["prefix_tokens"] for entry in result["speed"]] == [64, 128, 64]
    for entry in result["speed"]:
        assert entry["mfu"] > 0 and entry["time_over_possible"] > 0 and entry["memory_over_dry_run"] > 0
    (new,) = result["new_lengths"]
    assert len(set(new["prefix_tokens"])) == len(new["new_s"]) == len(new["seen_s"]) == 12 and new["new_over_seen"] > 0
    assert result["longest"][0]["fits_tokens"] == TINY.length_limit
    (case,) = result["rivals"]
    assert set(case["variants"]) == set(parts.variants_of(StepCase(**case["case"])))
    elsewhere = tmp_path / "elsewhere"
    done = run(f"--results={elsewhere}", f"--tabulate={tmp_path / 'gpu.json'}")
    assert done.returncode == 0, done.stderr[-4000:]
    assert {path.name for path in elsewhere.iterdir()} == {"gpu.json", "step_cpu.json"}
    for path in elsewhere.iterdir():
        again, first = (json.loads((folder / path.name).read_text()) for folder in (elsewhere, tmp_path))
        assert again | {"date": None} == first | {"date": None}
