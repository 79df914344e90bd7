"""Pairs and report as one HTML page that needs nothing else: no script, no font, no address.

Everything from the pairs goes through a template with automatic escaping: documents hold HTML.
"""

from __future__ import annotations

from collections import Counter
from pathlib import PurePath
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from megatron_longpo.generation.report import GenerationReport, in_words
from megatron_longpo.inspection.inspect import Inspection
from megatron_longpo.inspection.numbers import Histogram, histogram
from megatron_longpo.inspection.page_template import TEMPLATE
from megatron_longpo.inspection.plain_text import printable, shortened
from megatron_longpo.inspection.plots import bars, distribution, shares_over, short_number, two_distributions
from megatron_longpo.inspection.report_text import duration
from megatron_longpo.inspection.statistics import (
    CHOSEN,
    CHUNKS,
    DOCUMENTS,
    LONG_PROMPTS,
    REJECTED,
    SHORT_PROMPTS,
    PairStatistics,
)
from megatron_longpo.inspection.style import CSS
from megatron_longpo.inspection.view import PairView, Text
from megatron_longpo.inspection.words import marked_differences

MIN_MARKED_SIMILARITY = 0.5
"""Where answers share less, nearly every word would be marked, which shows nothing."""


def html_page(inspection: Inspection, max_chars: int) -> str:
    """The page.

    Args:
        inspection: What is shown.
        max_chars: Longest text to show in full; of longer ones the middle is left out.
    """
    statistics, generation = inspection.statistics, inspection.generation
    pairs = [_pair(view, max_chars) for view in inspection.views]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE).render(
        css=Markup(CSS),
        files=[str(file) for file in inspection.files],
        tiles=_tiles(statistics) if statistics else [],
        plots=_plots(statistics) if statistics else [],
        lengths=_lengths(statistics) if statistics else [],
        generation=_generation(generation) if generation else None,
        pairs=pairs,
        asked_for=inspection.document_id,
        num_pairs=statistics.num_pairs if statistics else len(pairs),
        marks_differences=any(pair["is_marked"] for pair in pairs),
    )


def _tiles(statistics: PairStatistics) -> list[tuple[str, str]]:
    """The most telling numbers, each with what it is."""
    what = DOCUMENTS if _unit(statistics, DOCUMENTS) else LONG_PROMPTS
    unit = _unit(statistics, what)
    assert unit is not None, "every row has a document or a long prompt"
    median = statistics.lengths[what, unit].quantiles()[1]
    return [
        (f"{statistics.num_documents:,}", _plural(statistics.num_documents, "document")),
        (f"{statistics.num_pairs:,}", _plural(statistics.num_pairs, "pair")),
        (f"{median:,.0f}", f"{unit} in the median {what.removesuffix('s')}"),
        (f"{statistics.similarity.quantiles()[1]:.2f}", "median similarity of the answers"),
        (f"{statistics.num_chosen_longer / statistics.num_pairs * 100:.0f} %", "of chosen are the longer answer"),
    ]


def _plots(statistics: PairStatistics) -> list[dict[str, Any]]:
    plots = [_length_plot(statistics, what) for what in (DOCUMENTS, LONG_PROMPTS, CHUNKS, SHORT_PROMPTS)]
    plots = [plot for plot in plots if plot]
    unit = next(unit for unit in ("tokens", "words") if (CHOSEN, unit) in statistics.lengths)
    names = Markup('<span class="chosen-name">chosen</span> and <span class="rejected-name">rejected</span>')
    plots.append({"title": "Answers", "about": names + f", length in {unit}", "svg": _answers(statistics, unit)})
    plots.append(
        {
            "title": "Similarity of the answers",
            "about": "Share of words that chosen and rejected have in common: 1 is all, 0 is none",
            "svg": distribution(_unit_histogram(statistics)),
        }
    )
    turns = sorted(Counter(statistics.turns.values().astype(int).tolist()).items())
    titles = [f"{count:,} with {_plural(number, 'pair', True)}" for number, count in turns]
    svg = bars([str(number) for number, _ in turns], [count for _, count in turns], titles)
    plots.append({"title": "Pairs per document", "about": "Documents with 1, 2, … pairs", "svg": svg})
    if statistics.num_with_span:
        plots.append(
            {
                "title": "Place of the chunks",
                "about": "Share of chunks that cover each twentieth of their document",
                "svg": shares_over(statistics.coverage(), ("beginning", "end of the document")),
            }
        )
    return plots


def _length_plot(statistics: PairStatistics, what: str) -> dict[str, Any]:
    """How long documents or chunks are; nothing if there are none."""
    unit = _unit(statistics, what)
    if unit is None:
        return {}
    svg = distribution(histogram(statistics.lengths[what, unit].values()))
    return {"title": what.capitalize(), "about": f"Length in {unit}", "svg": svg}


def _unit(statistics: PairStatistics, what: str) -> str | None:
    """What documents or chunks are measured in; None where there are none."""
    return next((unit for unit in ("tokens", "characters") if (what, unit) in statistics.lengths), None)


def _answers(statistics: PairStatistics, unit: str) -> Markup:
    both = [statistics.lengths[name, unit].values() for name in (CHOSEN, REJECTED)]
    edges = histogram(np.concatenate(both), 24).edges
    shown = []
    for values in both:
        counts, _ = np.histogram(np.minimum(values, edges[-1]), edges)
        shown.append(Histogram(edges, tuple(counts.tolist()), bool(values.max() > edges[-1])))
    return two_distributions(*shown)


def _unit_histogram(statistics: PairStatistics) -> Histogram:
    counts, edges = np.histogram(statistics.similarity.values(), 20, (0.0, 1.0))
    return Histogram(tuple(edges.tolist()), tuple(counts.tolist()), False)


def _lengths(statistics: PairStatistics) -> list[tuple[str, list[str]]]:
    return [
        (f"{what}, {unit}", [f"{len(numbers):,}", *(f"{number:,.0f}" for number in numbers.quantiles())])
        for what, unit, numbers in statistics.sorted_lengths()
    ]


def _generation(report: GenerationReport) -> dict[str, Any]:
    numbers = [
        ("documents read", f"{report.documents_read:,}"),
        ("documents with pairs", f"{report.documents_with_pairs:,}"),
        ("pairs planned", f"{report.turns_planned:,}"),
        ("pairs kept", f"{report.turns_kept:,}"),
        ("tokens read", short_number(report.prompt_tokens)),
        ("tokens written", short_number(report.completion_tokens)),
        ("mean time of a document", duration(report.seconds / max(report.documents_read, 1))),
    ]
    dropped = []
    for title, counts in (("Documents dropped", report.documents_dropped), ("Pairs dropped", report.turns_dropped)):
        top = max(counts.values(), default=0)
        rows = [(in_words(name), f"{count:,}", 100 * count / top) for name, count in counts.most_common() if count]
        dropped.append({"title": title, "rows": rows})
    return {"numbers": numbers, "dropped": dropped}


def _pair(view: PairView, max_chars: int) -> dict[str, Any]:
    chosen, rejected = _answer_runs(view, max_chars)
    return {
        "view": view,
        "location": PurePath(view.location).name,
        "document_name": "long prompt" if view.whole_prompts else "document",
        "chunk_name": "Short prompt" if view.whole_prompts else "Chunk",
        "chunk": _cut(view.chunk, max_chars) if view.chunk else None,
        "place": tuple(100 * share for share in view.chunk_share) if view.chunk_share else None,
        "instruction": _cut(view.instruction, max_chars),
        "context": [(message.role, printable(message.content)) for message in view.context],
        "chosen": chosen,
        "rejected": rejected,
        "is_marked": any(differs for runs in (chosen, rejected) for _, differs in runs["head"]),
    }


def _answer_runs(view: PairView, max_chars: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both answers in runs, marked where they differ if they are alike enough and shown in full."""
    answers = [_cut(text, max_chars) for text in (view.chosen, view.rejected)]
    one, two = (answer["text"] for answer in answers)
    marked = view.similarity >= MIN_MARKED_SIMILARITY and not any(answer["left_out"] for answer in answers)
    runs = marked_differences(one, two) if marked else ([(one, False)], [(two, False)])
    chosen, rejected = ({**answer, "head": run} for answer, run in zip(answers, runs, strict=True))
    return chosen, rejected


def _cut(text: Text, max_chars: int) -> dict[str, Any]:
    """A text for the template: its beginning, what is left out, and its end."""
    head, left_out, tail = shortened(text.text or "", max_chars)
    return {
        "is_known": text.text is not None,
        "length": str(text.length),
        "text": printable(head.strip("\n")),
        "left_out": f"{left_out:,}" if left_out else "",
        "tail": printable(tail.strip("\n")),
    }


def _plural(count: int, name: str, with_count: bool = False) -> str:
    text = name if count == 1 else f"{name}s"
    return f"{count:,} {text}" if with_count else text
