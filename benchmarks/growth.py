"""How time and memory of a step grow with the document, as one picture without absolute numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from megatron_longpo.report import COLOURS, GRID, INK, MUTED

_LINES = {
    "shared_prefix": ("shared prefix", COLOURS[0]),
    "two_sequences": ("two sequences", COLOURS[1]),
    "two_sequences_full_logits": ("two sequences, full logits", COLOURS[5]),
    "shared_prefix_dpo": ("shared prefix, DPO loss alone", COLOURS[4]),
    "trl": ("TRL DPOTrainer", COLOURS[3]),
}
_RATIOS = {
    "two_sequences": ("against two sequences", COLOURS[1]),
    "two_sequences_full_logits": ("against two sequences, full logits", COLOURS[5]),
    "trl": ("against TRL, DPO loss alone", COLOURS[3]),
}
_MORE = {(4, 128): ("4 turns", "s"), (1, 512): ("responses of 512", "^")}
Summary = Mapping[str, Any]


def draw_growth(summaries: Sequence[Summary], output: Path) -> None:
    """Draw time and peak memory over document length, and our ratios to the rivals.

    Args:
        summaries: What `summarize` made of every case.
        output: A PNG file; replaced.
    """
    figure = Figure(figsize=(10.5, 9.2), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    (time, memory), (faster, smaller) = figure.subplots(2, 2)
    main = [s for s in summaries if (s["case"]["turns"], s["case"]["response_tokens"]) == (1, 128)]
    _growth(time, main, "step_s", "Time of a step")
    _growth(memory, main, "peak_gib", "Peak memory of a step")
    _ratio(faster, summaries, "speedup_vs_", "Times faster")
    _ratio(smaller, summaries, "memory_ratio_vs_", "Share of the rival's peak memory")
    for axes in (time, memory, faster, smaller):
        _style(axes, sorted({s["case"]["prefix_tokens"] for s in summaries}))
    figure.tight_layout(rect=(0, 0, 1, 0.94), h_pad=2.0, w_pad=2.5)
    figure.text(0.012, 0.985, "One training step over document length", fontsize=14, weight="bold", color=INK, va="top")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)


def _growth(axes: Axes, summaries: Sequence[Summary], key: str, title: str) -> None:
    first = summaries[0]
    base = first["variants"]["shared_prefix"][key]
    axes.set_title(
        f"{title}\nshared prefix at {_tokens(first['case']['prefix_tokens'])} = 1, one turn, responses of 128",
        **_TITLE,
    )
    for name, (label, colour) in _LINES.items():
        points = [
            (s["case"]["prefix_tokens"], s["variants"][name][key] / base) for s in summaries if name in s["variants"]
        ]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=4, linewidth=1.6, label=label)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.legend(**_LEGEND)


def _ratio(axes: Axes, summaries: Sequence[Summary], key: str, title: str) -> None:
    axes.set_title(f"{title}\ncircles: one turn, responses of 128", **_TITLE)
    for name, (label, colour) in _RATIOS.items():
        for shape in ((1, 128), *_MORE):
            points = [
                (s["case"]["prefix_tokens"], s[key + name])
                for s in summaries
                if key + name in s and (s["case"]["turns"], s["case"]["response_tokens"]) == shape
            ]
            if not points:
                continue
            if shape == (1, 128):
                axes.plot(
                    *zip(*points, strict=True), color=colour, marker="o", markersize=4, linewidth=1.6, label=label
                )
            else:
                marker = _MORE[shape][1]
                axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=5, linestyle="none")
    for label, marker in _MORE.values():
        axes.plot([], [], color=MUTED, marker=marker, markersize=5, linestyle="none", label=label)
    axes.axhline(1.0, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_ylim(bottom=0)
    axes.legend(**_LEGEND)


_LEGEND: dict[str, Any] = {
    # Below the diagram: curves fill it in ways that no one place inside would spare.
    "loc": "upper left",
    "bbox_to_anchor": (0, -0.17),
    "ncol": 2,
    "frameon": False,
    "fontsize": 8,
    "labelcolor": INK,
}
_TITLE: dict[str, Any] = {"loc": "left", "fontsize": 9.5, "color": INK, "linespacing": 1.5}


def _style(axes: Axes, lengths: Sequence[int]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(lengths, [_tokens(length) for length in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    if axes.get_yscale() == "log":
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("tokens of the document", fontsize=8.5, color=MUTED)
    axes.tick_params(colors=MUTED, labelsize=8, length=0)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)


def _tokens(count: int) -> str:
    return f"{count // 1024}K" if count % 1024 == 0 else str(count)
