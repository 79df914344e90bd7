"""Metrics files to a picture and a table."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from matplotlib.image import imread

from megatron_longpo.metrics_file import read_metrics
from megatron_longpo.report import plot_runs, summary_table
from tools import plot_metrics


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
    # A dollar sign is one, and begins no formula.
    plot_runs({"a run": run, "$\\frac{$": run}, tmp_path / "new" / "report.png", "Title", "subtitle")
    height, width, _ = imread(tmp_path / "new" / "report.png").shape
    assert round(width / (4.3 * 150)) == columns
    assert height > 500


def test_what_one_run_lacks_is_drawn_of_the_other(tmp_path: Path) -> None:
    rewards = ["rewards/chosen", "rewards/rejected"]
    runs = {
        "without": write_run(tmp_path / "a.jsonl", ["longpo/nll_loss"]),
        "with": write_run(tmp_path / "b.jsonl", ["longpo/nll_loss", *rewards]),
    }
    plot_runs(runs, tmp_path / "report.svg", "Title")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "report.svg"]
    assert "reward" not in summary_table(runs)


def test_a_line_for_many_steps_counts_for_all_of_them(tmp_path: Path) -> None:
    rows = [{"iteration": step, "loss": float("nan") if step == 20 else 3.0} for step in (10, 20, 25)]
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(json.dumps(row | {"iteration_time_s": 2.0, "longpo/nll_loss": row["loss"]}) + "\n" for row in rows)
    )
    lines = [line.split() for line in summary_table({"run": path}).splitlines()]
    assert lines[-1] == ["seconds", "in", "steps", "50.0"]
    assert lines[-2][-1] == "nan" and lines[1][-3:] == ["3.000", "→", "3.000"]


@pytest.mark.parametrize("not_finite", ["null", "NaN"])
def test_skipped_steps_are_gaps_in_the_curves(tmp_path: Path, not_finite: str) -> None:
    path = write_run(tmp_path / "a.jsonl", ["rewards/chosen", "rewards/rejected"])
    with path.open("a") as file:
        file.write(f'{{"iteration": 13, "rewards/chosen": {not_finite}, "rewards/rejected": {not_finite}}}\n')
    assert math.isnan(read_metrics(path)[0][-1]["rewards/chosen"])
    plot_runs({"run": path}, tmp_path / "report.svg", "Title")
    picture = (tmp_path / "report.svg").read_text()
    assert "<!-- chosen -->" in picture and "<!-- rejected -->" in picture


def test_the_half_line_of_a_killed_run_is_left_out(tmp_path: Path) -> None:
    path = write_run(tmp_path / "a.jsonl", ["longpo/nll_loss"])
    whole = read_metrics(path)
    path.write_text(path.read_text() + '{"iteration": 13, "los')
    assert read_metrics(path) == whole


@pytest.mark.parametrize(
    ("output", "metric", "message"),
    [
        ("report", "longpo/nll_loss", r"--output .*report must end in \.png, \.pdf, \.svg"),
        ("folder.png", "longpo/nll_loss", r"--output .*folder\.png is a folder"),
        ("report.png", "other", r"a\.jsonl: holds no metric that is drawn"),
    ],
)
def test_pictures_that_cannot_be_drawn(tmp_path: Path, output: str, metric: str, message: str) -> None:
    (tmp_path / "folder.png").mkdir()
    run = tmp_path / "a.jsonl"
    run.write_text(json.dumps({"iteration": 1, metric: 1.0}) + "\n")
    with pytest.raises(ValueError, match=message):
        plot_runs({"run": run}, tmp_path / output, "Title")
    assert not (tmp_path / "report.png").exists()


@pytest.mark.parametrize(
    "content", ["not json\n", "[" * 100_000 + "\n", '{"loss": 1}\n', "[1]\n", '{"iteration": 1, "loss": "x"}\n', ""]
)
def test_a_file_that_is_no_metrics_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"bad\.jsonl"):
        read_metrics(tmp_path / "bad.jsonl")


def test_a_file_that_is_not_there_leaves_nothing_behind(tmp_path: Path) -> None:
    for name, problem in (("none.jsonl", "is no file"), (".", "is a folder")):
        with pytest.raises(ValueError, match=rf"{problem}; give what --metrics-jsonl wrote"):
            plot_runs({"run": tmp_path / name}, tmp_path / "new" / "report.png", "Title")
    assert not list(tmp_path.iterdir())


def test_a_run_of_one_step_has_a_table(tmp_path: Path) -> None:
    lines = summary_table({"run": write_run(tmp_path / "a.jsonl", ["rewards/margins"], num_steps=1)}).splitlines()
    assert lines[1].split() == ["reward", "margin", "+1.000", "→", "+1.000"]
    assert lines[-1].split() == ["seconds", "in", "steps", "0.5"]


def test_runs_are_named_or_go_by_their_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (write_run(tmp_path / name, ["rewards/margins"]) for name in ("lr=1.jsonl", "b.jsonl"))
    output = f"--output={tmp_path / 'out.svg'}"
    for words, said in (
        ([f"={first}"], f"'={first}' must be NAME=FILE, or a file alone"),
        (["name="], "'name=' must be NAME=FILE, or a file alone"),
        ([f"a={first}", f"a={second}"], "the name 'a' occurs twice: give every run its own, NAME=FILE"),
    ):
        monkeypatch.setattr("sys.argv", ["plot_metrics.py", *words, output])
        with pytest.raises(SystemExit, match="2"):
            plot_metrics.main()
        assert said in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["plot_metrics.py", str(first), f"two={second}", output])
    plot_metrics.main()
    assert capsys.readouterr().out.splitlines()[0].split() == [str(first), "two"]
    assert (tmp_path / "out.svg").is_file()
