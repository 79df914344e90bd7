"""The report for the terminal: counts, lengths, and histograms of characters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from megatron_longpo.generation.report import GenerationReport, in_words
from megatron_longpo.inspection.inspect import Inspection
from megatron_longpo.inspection.statistics import NUM_PARTS, PairStatistics
from megatron_longpo.inspection.terminal import Terminal, bar

_BAR_WIDTH = 32


def report_lines(inspection: Inspection, terminal: Terminal) -> Iterator[str]:
    """The lines of the report; none where not all pairs were read."""
    statistics = inspection.statistics
    if statistics is not None:
        yield terminal.paint(f"━━ Report {'━' * max(0, terminal.width - 10)}", "bold")
        yield from _counts(statistics)
        yield from _lengths(statistics, terminal)
        yield from _turns(statistics, terminal)
        yield from _similarity(statistics, terminal)
        yield from _positions(statistics, terminal)
    if statistics is not None and inspection.generation is not None:
        yield from _generation(inspection.generation, terminal)


def _counts(statistics: PairStatistics) -> Iterator[str]:
    formats = ", ".join(f"{count:,} {name}" for name, count in statistics.formats.items())
    longer = statistics.num_chosen_longer / statistics.num_pairs
    rows = [
        ("documents", f"{statistics.num_documents:,}  ({formats})"),
        ("pairs", f"{statistics.num_pairs:,}"),
        ("with a short prompt", f"{statistics.num_with_chunk:,}"),
        ("with the chunk's place known", f"{statistics.num_with_span:,}"),
        ("chosen longer than rejected", f"{longer * 100:.0f} %"),
    ]
    yield from (f"{name:<30}{value}" for name, value in rows)


def _lengths(statistics: PairStatistics, terminal: Terminal) -> Iterator[str]:
    yield ""
    yield terminal.paint(
        f"{'lengths':<25}{'count':>10}{'minimum':>11}{'median':>11}{'95 % up to':>12}{'maximum':>11}", "bold"
    )
    for what, unit, numbers in statistics.sorted_lengths():
        low, middle, high, top = (f"{number:,.0f}" for number in numbers.quantiles())
        yield f"{what + ', ' + unit:<25}{len(numbers):>10,}{low:>11}{middle:>11}{high:>12}{top:>11}"


def _turns(statistics: PairStatistics, terminal: Terminal) -> Iterator[str]:
    counts = Counter(statistics.turns.values().astype(int).tolist())
    rows = [(str(turns), count, f"{count:,}") for turns, count in sorted(counts.items())]
    yield from _bars("pairs per document", rows, terminal)


def _similarity(statistics: PairStatistics, terminal: Terminal) -> Iterator[str]:
    values = statistics.similarity.values()
    counts, _ = np.histogram(values, [step / 10 for step in range(11)])
    rows = [(f"{step / 10:.1f} to {step / 10 + 0.1:.1f}", count, f"{count:,}") for step, count in enumerate(counts)]
    _, median, _, _ = statistics.similarity.quantiles()
    title = f"similarity of chosen and rejected: share of words in common, median {median:.2f}"
    yield from _bars(title, rows, terminal)


def _positions(statistics: PairStatistics, terminal: Terminal) -> Iterator[str]:
    if not statistics.num_with_span:
        return
    shares = statistics.coverage()
    rows = []
    for part in range(0, NUM_PARTS, 2):
        share = (shares[part] + shares[part + 1]) / 2
        rows.append((f"{part * 100 // NUM_PARTS} to {(part + 2) * 100 // NUM_PARTS} %", share, f"{share * 100:.1f} %"))
    yield from _bars("place of chunks: how many cover each tenth of their document", rows, terminal)


def _generation(report: GenerationReport, terminal: Terminal) -> Iterator[str]:
    yield ""
    yield terminal.paint("generation", "bold")
    rows = [
        ("documents read", f"{report.documents_read:,}"),
        ("documents with pairs", f"{report.documents_with_pairs:,}"),
        ("pairs planned", f"{report.turns_planned:,}"),
        ("pairs kept", f"{report.turns_kept:,}"),
        ("tokens read by the model", f"{report.prompt_tokens:,}"),
        ("tokens written by the model", f"{report.completion_tokens:,}"),
        ("mean time of a document", duration(report.seconds / max(report.documents_read, 1))),
    ]
    yield from (f"{name:<30}{value}" for name, value in rows)
    for title, dropped in (("documents dropped", report.documents_dropped), ("pairs dropped", report.turns_dropped)):
        if dropped:
            bars = [(in_words(reason), count, f"{count:,}") for reason, count in dropped.most_common()]
            yield from _bars(f"{title}, by reason", bars, terminal)


def _bars(title: str, rows: Sequence[tuple[str, float, str]], terminal: Terminal) -> Iterator[str]:
    yield ""
    yield terminal.paint(title, "bold")
    top = max(value for _, value, _ in rows) or 1
    width = max(len(name) for name, _, _ in rows)
    for name, value, shown in rows:
        yield f"  {name:>{width}}  {terminal.paint(bar(value / top, _BAR_WIDTH), 'accent')} {shown}"


def duration(seconds: float) -> str:
    """A time as it is said: 75 s, 12 min, 3 h 20 min."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
