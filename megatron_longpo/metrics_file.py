"""The file of ``--metrics-jsonl``: a JSON object of numbers a line, for training steps and for evaluations.

What is not finite, the loss of a skipped step say, is ``null``: JSON has no NaN, and strict readers refuse the file.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

Metrics = dict[str, float]


def read_metrics(path: str | Path) -> tuple[list[Metrics], list[Metrics]]:
    """Read a `--metrics-jsonl` file; of a run that is still going, or was killed, the last line may be half a line.

    Returns:
        The training steps, and the evaluations with the prefix ``eval/`` taken off their names.

    Raises:
        ValueError: There is no such file, a line is no JSON object of numbers with an ``iteration``, or there is no
            training step at all.
    """
    if not Path(path).is_file():
        problem = "is a folder" if Path(path).is_dir() else "is no file"
        raise ValueError(f"{path}: {problem}; give what --metrics-jsonl wrote")
    steps: list[Metrics] = []
    evaluations: list[Metrics] = []
    *lines, half = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")
    lines += [half] * (metrics_of(half) is not None)
    for number, line in enumerate(lines, 1):
        row = metrics_of(line)
        if row is None:
            raise ValueError(f"{path}:{number}: not a line of metrics; give what --metrics-jsonl wrote")
        if any(name.startswith("eval/") for name in row):
            evaluations.append({name.removeprefix("eval/"): value for name, value in row.items()})
        else:
            steps.append(row)
    if not steps:
        raise ValueError(f"{path}: holds no training step; let the run make at least one")
    return steps, evaluations


def line_of(metrics: Metrics) -> str:
    """The line of one report, without its end."""
    row = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    return json.dumps(row, allow_nan=False)


def metrics_of(line: str) -> Metrics | None:
    """The values of a line, with NaN for ``null``; None if it is none of metrics. Reads NaN too, as in old files."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or row.get("iteration") is None:
        return None
    row = {name: math.nan if value is None else value for name, value in row.items()}
    return row if all(isinstance(number, int | float) for number in row.values()) else None
