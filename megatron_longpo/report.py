"""The curves of one or more runs as one picture, and their first and last values as a table.

Both read what the trainer writes with `--metrics-jsonl`. Runs are drawn over one another, each thinner than the one
before it, so that two that agree show as one line with a core.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from megatron_longpo.files import atomic_writer, check_writable
from megatron_longpo.metrics_file import Metrics, read_metrics

FORMATS = (".png", ".pdf", ".svg")
"""Endings of pictures."""

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
"""Okabe and Ito's palette, told apart with any colour vision."""

INK, MUTED, GRID = "#222222", "#6B6B6B", "#E4E4E4"


@dataclass(frozen=True)
class Panel:
    """One diagram: the metrics it shows, over steps.

    Args:
        title: What is shown.
        unit: What the vertical axis counts.
        curves: Metric names and how each is labelled; the label is drawn only where there are several.
        level: A value to mark, with what it means.
        limits: Lowest and highest value of the axis where they are known; None leaves an end to the data.
    """

    title: str
    unit: str
    curves: tuple[tuple[str, str], ...]
    level: tuple[float, str] | None = None
    limits: tuple[float | None, float | None] = (None, None)


PANELS = (
    Panel("Negative log-likelihood", "nats per token of the chosen sequence", (("longpo/nll_loss", "NLL"),)),
    Panel("Preference loss", "−log σ(margin)", (("longpo/preference_loss", "loss"),), (0.6931, "no preference")),
    Panel("Constraint", "nats, summed over the chosen answers", (("longpo/kl", "KL"),)),
    Panel("Rewards", "β (log π − log π reference)", (("rewards/chosen", "chosen"), ("rewards/rejected", "rejected"))),
    Panel("Reward margin", "chosen − rejected", (("rewards/margins", "margin"),), (0.0, "no preference")),
    Panel(
        "Accuracy",
        "share of documents with a margin above 0",
        (("rewards/accuracies", "accuracy"),),
        level=(0.5, "chance"),
        limits=(-0.04, 1.04),
    ),
    Panel("Throughput", "tokens per second and rank", (("tokens_per_s_per_gpu", "rate"),), limits=(0.0, None)),
)

TABLE = (
    ("longpo/nll_loss", "NLL (nats/token)", ".3f"),
    ("longpo/preference_loss", "preference loss", ".3f"),
    ("longpo/kl", "KL (nats)", ".3f"),
    ("rewards/chosen", "reward, chosen", "+.3f"),
    ("rewards/rejected", "reward, rejected", "+.3f"),
    ("rewards/margins", "reward margin", "+.3f"),
    ("rewards/accuracies", "reward accuracy", ".2f"),
)


@rc_context({"text.parse_math": False})  # a $ in a name is a $
def plot_runs(runs: Mapping[str, str | Path], output: str | Path, title: str, subtitle: str = "") -> None:
    """Draw the curves of several runs into one picture.

    Args:
        runs: Metrics file by the run's name, in drawing order.
        output: Where the picture goes; its ending decides the format, one of `FORMATS`.
        title: Headline.
        subtitle: One line below it.

    Raises:
        ValueError: A file is none of metrics, nothing in them can be drawn, or ``output`` cannot be written.
    """
    output = Path(output)
    if output.suffix not in FORMATS:
        raise ValueError(f"--output {output} must end in {', '.join(FORMATS)}: the ending is the format")
    data = {name: read_metrics(path) for name, path in runs.items()}
    check_writable(output, "--output", "report.png")
    panels = [panel for panel in PANELS if _with_curves(panel, data)]
    if not panels:
        raise ValueError(
            f"{', '.join(map(str, runs.values()))}: holds no metric that is drawn, such as rewards/margins"
        )
    num_columns = 3 if len(panels) > 4 else 2
    num_rows = -(-len(panels) // num_columns)
    figure = Figure(figsize=(4.3 * num_columns, 3.1 * num_rows + 1.0), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(num_rows, num_columns, squeeze=False).flat
    for axis, panel in zip(axes, panels, strict=False):
        _draw(axis, panel, data)
    for axis in list(axes)[len(panels) :]:
        axis.set_visible(False)
    height = figure.get_figheight()
    figure.subplots_adjust(
        left=0.75 / figure.get_figwidth(),
        right=1 - 0.3 / figure.get_figwidth(),
        bottom=0.55 / height,
        top=1 - 1.25 / height,
        wspace=0.30,
        hspace=0.48,
    )
    left = figure.subplotpars.left
    figure.text(left, 1 - 0.22 / height, title, fontsize=15, fontweight="bold", color=INK, va="top")
    figure.text(left, 1 - 0.55 / height, subtitle, fontsize=10, color=MUTED, va="top")
    _legend(figure, data)
    with atomic_writer(output, binary=True) as file:
        figure.savefig(file, format=output.suffix[1:])


def summary_table(runs: Mapping[str, str | Path], num_averaged: int = 5) -> str:
    """The mean of each run's first and last steps, and its speed, as aligned lines.

    Args:
        runs: Metrics file by the run's name.
        num_averaged: Steps at each end to average over.
    """
    data = {name: read_metrics(path) for name, path in runs.items()}
    width = max(20, *(len(name) for name in runs))
    lines = [f"{'':<20}" + "".join(f"  {name:>{width}}" for name in data)]
    for metric, label, form in TABLE:
        if all(metric in row for steps, _ in data.values() for row in steps):
            cells = []
            for steps, _ in data.values():
                first, last = _mean(steps[:num_averaged], metric), _mean(steps[-num_averaged:], metric)
                cells.append(f"{first:{form}} → {last:{form}}")
            lines.append(f"{label:<20}" + "".join(f"  {cell:>{width}}" for cell in cells))
        if all(evaluations and metric in evaluations[-1] for _, evaluations in data.values()):
            cells = [
                f"{evaluations[0][metric]:{form}} → {evaluations[-1][metric]:{form}}"
                for _, evaluations in data.values()
            ]
            lines.append(f"{'  held out':<20}" + "".join(f"  {cell:>{width}}" for cell in cells))
    rates = [_mean(steps[1:] or steps, "tokens_per_s_per_gpu") for steps, _ in data.values()]
    seconds = [_seconds(steps) for steps, _ in data.values()]
    lines.append(f"{'tokens/s per rank':<20}" + "".join(f"  {rate:>{width},.0f}" for rate in rates))
    lines.append(f"{'seconds in steps':<20}" + "".join(f"  {second:>{width},.1f}" for second in seconds))
    return "\n".join(lines)


def _with_curves(panel: Panel, data: Mapping[str, tuple[list[Metrics], list[Metrics]]]) -> list[list[Metrics]]:
    """The steps of the runs that have a panel's curves."""
    return [steps for steps, _ in data.values() if all(metric in steps[-1] for metric, _ in panel.curves)]


def _draw(axis: Axes, panel: Panel, data: Mapping[str, tuple[list[Metrics], list[Metrics]]]) -> None:
    if panel.level is not None:
        value, meaning = panel.level
        axis.axhline(value, color=MUTED, linewidth=0.9, linestyle=(0, (2, 3)), zorder=1)
    for number, (steps, evaluations) in enumerate(data.values()):
        for which, (metric, _) in enumerate(panel.curves):
            style: dict[str, Any] = {"color": _shade(number, paler=which > 0), "zorder": 2 + number}
            axis.plot(*_curve(steps, metric), linewidth=_width(number), **style)
            if any(metric in row for row in evaluations):
                axis.plot(*_curve(evaluations, metric), "o", markersize=6.5 - 2.2 * min(number, 2), **style)
    if len(panel.curves) > 1:
        _label_ends(axis, panel, _with_curves(panel, data)[0])
    axis.set_title(panel.title, fontsize=11.5, fontweight="bold", color=INK, loc="left", pad=16)
    # The unit stands above the axis, level, where it is read without turning the head.
    axis.text(0, 1.03, panel.unit, transform=axis.transAxes, fontsize=8.5, color=MUTED)
    axis.set_xlabel("step", fontsize=8.5, color=MUTED)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axis.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axis.tick_params(labelsize=8.5, colors=MUTED, length=0)
    axis.grid(axis="y", color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.margins(x=0.02, y=0.12)
    axis.set_ylim(*panel.limits)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(GRID)
    if panel.level is not None:
        # Set after the curves, which decide where the axis ends.
        axis.annotate(
            meaning,
            (1, value),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color=MUTED,
        )


def _label_ends(axis: Axes, panel: Panel, steps: Sequence[Metrics]) -> None:
    """Name each curve at its end: the upper one above its last steps, the lower one below."""
    curves = [(_curve(_finite(steps, metric), metric), label) for metric, label in panel.curves]
    ends = sorted((curve for curve in curves if curve[0][1]), key=lambda e: e[0][1][-1])
    for place, ((iterations, values), label) in enumerate(ends):
        upper = place > 0
        recent = values[-max(1, len(values) // 5) :]
        axis.annotate(
            label,
            (iterations[-1], max(recent) if upper else min(recent)),
            xytext=(0, 5 if upper else -5),
            textcoords="offset points",
            ha="right",
            va="bottom" if upper else "top",
            fontsize=8.5,
            color=INK,
        )


def _legend(figure: Figure, data: Mapping[str, tuple[list[Metrics], list[Metrics]]]) -> None:
    handles = [
        Line2D([], [], color=COLOURS[number % len(COLOURS)], linewidth=_width(number), label=name)
        for number, name in enumerate(data)
    ]
    if any(evaluations for _, evaluations in data.values()):
        handles.append(Line2D([], [], color=MUTED, marker="o", linestyle="", markersize=5, label="held-out documents"))
    figure.legend(
        handles=handles,
        loc="upper right",
        bbox_to_anchor=(figure.subplotpars.right, 1 - 0.12 / figure.get_figheight()),
        ncols=len(handles),
        frameon=False,
        fontsize=9.5,
        labelcolor=INK,
        handlelength=1.8,
        columnspacing=1.6,
    )


def _shade(number: int, paler: bool) -> str | tuple[float, ...]:
    """A run's colour; half-way to white for the second curve of a panel."""
    colour = COLOURS[number % len(COLOURS)]
    return tuple((1 + channel) / 2 for channel in to_rgb(colour)) if paler else colour


def _width(number: int) -> float:
    return max(1.3, 4.2 - 2.7 * number)


def _curve(rows: Sequence[Metrics], metric: str) -> tuple[list[float], list[float]]:
    present = [row for row in rows if metric in row]
    return [row["iteration"] for row in present], [row[metric] for row in present]


def _finite(rows: Sequence[Metrics], metric: str) -> list[Metrics]:
    """The rows that have it; those of skipped steps are not numbers."""
    return [row for row in rows if math.isfinite(row.get(metric, math.nan))]


def _mean(rows: Sequence[Metrics], metric: str) -> float:
    values = [row[metric] for row in _finite(rows, metric)]
    return sum(values) / len(values) if values else math.nan


def _seconds(steps: Sequence[Metrics]) -> float:
    """Time of all steps; with ``--log-interval`` a line is the mean over those since the line before."""
    first = steps[0]["iteration"]
    gaps = [after["iteration"] - before["iteration"] for before, after in itertools.pairwise(steps)]
    gaps.insert(0, min(first, max(gaps, default=first)))  # a resumed run's first line does not count from 0
    return sum(gap * row.get("iteration_time_s", math.nan) for gap, row in zip(gaps, steps, strict=True))
