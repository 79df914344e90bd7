"""The benchmark suite: its matrix, its files, and (slow) that it runs from end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.step.measure import Measurement
from benchmarks.step.summary import circumstances, summarize
from benchmarks.suite import CPU, write_results
from tests.training.commands import REPOSITORY, environment


def measured(step_s: float, peak_gib: float, loss: float = 2.0) -> list[Measurement]:
    return [Measurement([loss], [2 * step_s, step_s], [2 * step_s, step_s], 0.3, peak_gib)]


def result_of_all_cases() -> dict[str, Any]:
    cases = []
    for case in CPU.cases():
        size = case.prefix_tokens / 1024
        runs = {"shared_prefix": measured(size**1.5, 0.2 * size), "two_sequences": measured(2 * size**1.5, 0.4 * size)}
        if (case.turns, case.response_tokens) == (1, 128):
            runs["two_sequences_full_logits"] = measured(2.4 * size**1.5, 0.8 * size)
            runs["shared_prefix_dpo"] = measured(0.8 * size**1.5, 0.2 * size, loss=0.5)
            runs["trl"] = measured(3 * size**1.5, size, loss=0.5)
        cases.append(summarize(case, runs, by_cpu_time=True))
    return {**circumstances(1, by_cpu_time=True), "cases": cases}


def test_the_matrix_has_all_lengths_and_both_dimensions_beside_them() -> None:
    cases = list(CPU.cases())
    shapes = {(c.turns, c.response_tokens) for c in cases}
    assert shapes == {(1, 128), (4, 128), (1, 512)}
    assert [c.prefix_tokens for c in cases if c.turns == 1 and c.response_tokens == 128] == [
        2**n for n in range(10, 15)
    ]


def test_a_rerun_replaces_json_picture_and_table(tmp_path: Path) -> None:
    docs = tmp_path / "page.md"
    docs.write_text("above\n<!-- benchmark_step cpu -->\nold\n<!-- end of benchmark_step cpu -->\nbelow\n")
    (tmp_path / "step_cpu.json").write_text("old")
    result = result_of_all_cases()
    write_results(result, "cpu", tmp_path, docs)
    stored = json.loads((tmp_path / "step_cpu.json").read_text())
    assert stored["cases"] == json.loads(json.dumps(result["cases"]))
    assert {"machine", "versions", "commit"} <= set(stored)
    assert (tmp_path / "step_cpu.png").read_bytes().startswith(b"\x89PNG")
    page = docs.read_text()
    assert "old" not in page and page.startswith("above") and page.endswith("below\n")
    assert "| shared prefix against two sequences | 4,096 | 128 | 4 | 2.00 | 0.50x |" in page
    assert "| shared prefix against two sequences | 4,096 | 512 | 1 | 2.00 | 0.50x |" in page


@pytest.mark.slow
def test_runs_from_end_to_end(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.suite", "--tiny", f"--results={tmp_path}"],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert {path.name for path in tmp_path.iterdir()} == {"step_cpu.json", "step_cpu.png"}
