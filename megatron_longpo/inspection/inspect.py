"""One pass over pairs: a sample to look at, and numbers over all."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from megatron_longpo.data.tokenize import PromptTemplate
from megatron_longpo.data.tokenizer import TokenizerSpec
from megatron_longpo.generation.report import GenerationReport, read_reports
from megatron_longpo.import_pairs.text import split_document
from megatron_longpo.inspection.lengths import Ruler
from megatron_longpo.inspection.sample import Sample
from megatron_longpo.inspection.source import find_sources
from megatron_longpo.inspection.statistics import PairStatistics
from megatron_longpo.inspection.view import PairView, Viewer
from megatron_longpo.pair_formats.counting import count_rows
from megatron_longpo.pair_formats.document import PairsRow, PreferenceDocument
from megatron_longpo.pairs import TRL, read_formats


@dataclass(frozen=True)
class InspectOptions:
    """The flags of tools/inspect_pairs.py.

    Args:
        paths: Files or folders of pairs.
        num_pairs: ``--num-pairs``: how many to show; 0 shows the report alone.
        document_id: ``--id``: show all pairs of this document instead of a sample.
        seed: ``--seed`` of the sample.
        tokenizer: ``--tokenizer-model``: counts tokens and decodes tokenized rows.
        needs_report: Whether the report is wanted where ``--id`` shows a single document.
    """

    paths: tuple[str, ...]
    num_pairs: int = 5
    document_id: str | None = None
    seed: int = 0
    tokenizer: TokenizerSpec | None = None
    needs_report: bool = True

    def __post_init__(self) -> None:
        if self.num_pairs < 0:
            raise ValueError(f"--num-pairs {self.num_pairs} must be at least 0; 0 shows the report alone")


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Args:
        files: The files that were read.
        views: The pairs to show.
        statistics: Numbers over all pairs; None if not all were read.
        generation: What generation reported, if it did.
        document_id: The document that was asked for; None for a sample.
    """

    files: tuple[Path, ...]
    views: tuple[PairView, ...]
    statistics: PairStatistics | None
    generation: GenerationReport | None
    document_id: str | None = None


def inspect(options: InspectOptions, progress: bool = True) -> Inspection:
    """Read everything once; with ``--id`` and no report wanted, as far as the document.

    Raises:
        ValueError: A path, a row, a report, the tokenizer or the id is unusable; the message says what to do.
    """
    sources = find_sources(options.paths)
    generation = read_reports(sources.reports)
    ruler = Ruler(options.tokenizer.load() if options.tokenizer else None)
    viewer, statistics = Viewer(ruler), PairStatistics(ruler)
    sample = Sample(options.num_pairs, options.seed)
    found: list[PairView] = []
    ids: list[str] = []
    rows = tqdm(
        read_formats(list(sources.pairs)),
        # Counting reads every file to its end.
        total=count_rows(sources.pairs) if progress and options.needs_report else None,
        desc="inspect",
        unit="document",
        disable=None if progress else True,  # None: where nobody watches
        leave=False,
    )
    with rows:
        for name, row in map(_told_apart, rows):
            if options.document_id is None:
                for turn, make_view in enumerate(viewer.views(row)):
                    sample.offer(row.id, turn, make_view)
            elif row.id == options.document_id:
                found = [make_view() for make_view in viewer.views(row)]
                if not options.needs_report:
                    return Inspection(sources.pairs, tuple(found), None, None, options.document_id)
            else:
                ids.append(row.id)
            statistics.add(name, row)
    if options.document_id is not None and not found:
        close = difflib.get_close_matches(options.document_id, ids, n=3)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"ids look like {ids[0]!r}"
        raise ValueError(f"--id {options.document_id}: none of {len(ids):,} documents has this id; {hint}")
    views = tuple(found) if options.document_id is not None else tuple(sample.views())
    return Inspection(sources.pairs, views, statistics, generation, options.document_id)


def _told_apart(named: tuple[str, PairsRow]) -> tuple[str, PairsRow]:
    """A row with document and instruction told apart, where its prompts hold both and show where one ends."""
    name, row = named
    if name == TRL and isinstance(row, PreferenceDocument):
        row, _ = split_document(row, PromptTemplate())
    return name, row
