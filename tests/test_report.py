"""Metrics files to a picture and a table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from matplotlib.image import imread

from megatron_longpo.report import plot_runs, read_metrics, summary_table


def write_run(path: Path, metrics: list[str], num_steps: int = 12, offset: float = 0.0) -> Path:
    rows: list[dict[str, float]] = []
    for step in range(1, num_steps + 1):
        rate = {"iteration": step, "tokens_per_s_per_gpu": 100.0, "iteration_time_s": 0.5}
        rows.append(rate | dict.fromkeys(metrics, offset + step))
        if step % 6 == 0:
            rows.append({"iteration": step} | {f"eval/{name}": offset + step + 0.5 for name in metrics})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_evaluations_are_told_from_steps(tmp_path: Path) -> None:
    steps, evaluations = read_metrics(write_run(tmp_path / "a.jsonl", ["rewards/margins"]))
    assert [row["iteration"] for row in steps] == list(range(1, 13))
    assert evaluations == [{"iteration": 6, "rewards/margins": 6.5}, {"iteration": 12, "rewards/margins": 12.5}]


def test_the_table_has_the_mean_of_both_ends(tmp_path: Path) -> None:
    runs = {
        "one": write_run(tmp_path / "a.jsonl", ["rewards/margins"]),
        "two": write_run(tmp_path / "b.jsonl", ["rewards/margins"], offset=100),
    }
    lines = summary_table(runs, num_averaged=3).splitlines()
    assert lines[0].split() == ["one", "two"]
    assert lines[1].split() == ["reward", "margin", "+2.000", "→", "+11.000", "+102.000", "→", "+111.000"]
    assert lines[2].split() == ["held", "out", "+6.500", "→", "+12.500", "+106.500", "→", "+112.500"]
    assert lines[-1].split() == ["seconds", "in", "steps", "6.0", "6.0"]


@pytest.mark.parametrize(
    ("metrics", "columns"),
    [
        (["longpo/nll_loss"], 2),
        (["longpo/nll_loss", "longpo/preference_loss", "rewards/chosen", "rewards/rejected", "rewards/margins"], 3),
    ],
)
def test_only_the_panels_of_the_metrics_are_drawn(tmp_path: Path, metrics: list[str], columns: int) -> None:
    run = write_run(tmp_path / "a.jsonl", metrics)
    plot_runs({"a run": run, "another": run}, tmp_path / "new" / "report.png", "Title", "subtitle")
    height, width, _ = imread(tmp_path / "new" / "report.png").shape
    assert round(width / (4.3 * 150)) == columns
    assert height > 500


@pytest.mark.parametrize("content", ["not json\n", '{"loss": 1}\n', "[1]\n", ""])
def test_a_file_that_is_no_metrics_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"bad\.jsonl"):
        read_metrics(tmp_path / "bad.jsonl")
