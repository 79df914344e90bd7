"""Cutting a document into chunks where a reader would: at sections, functions, paragraphs, lines.

A document is tiled from its start: each chunk has a drawn length between the two limits and ends at the best boundary
around it. Some of the tiles are drawn. Everything depends on (seed, document id) and the text alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_longpo.generation.draw import draw_between, shuffled

_SECTION = re.compile(
    r"^(?:\\(?:part|chapter|(?:sub)*section|(?:sub)?paragraph)\*?[\[{]"  # LaTeX
    r"|\#{1,6}[ \t]+\S"  # Markdown
    r"|[^\s].{0,120}\n(?:={3,}|-{3,}|~{3,}|\*{3,})[ \t]*$)",  # underlined titles
    re.MULTILINE,
)
_DEFINITION = re.compile(
    # The line before is blank or closes a block, so that comments and decorators stay with what they belong to.
    r"(?:(?<=\n\n)|(?<=\}\n))(?=(?:[#/*@][^\n]*\n)*"
    r"(?:(?:pub|export|public|private|protected|static|abstract|final|async|unsafe|inline|virtual|template\b.*)\b\s*)*"
    r"(?:def|class|function|func|fn|struct|enum|trait|impl|interface|module|namespace|type|const|let|var|void|int)\b)"
)
_PARAGRAPH = re.compile(r"\n[ \t]*\n[ \t\n]*(?=\S)|\n[ \t]*\n(?=[ \t]*\S)")
_LINE = re.compile(r"\n(?=.)")
_SENTENCE = re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s+|(?<=[。！？])")

_CLASSES: tuple[tuple[re.Pattern[str], bool], ...] = (
    (_SECTION, False),
    (_DEFINITION, False),
    (_PARAGRAPH, True),
    (_LINE, True),
    (_SENTENCE, True),
)
"""Boundaries from best to worst, and whether the cut is behind the match (else before it). Sections and definitions
have the same rank."""


@dataclass(frozen=True)
class Chunk:
    """A piece of a document: characters ``[start, end)`` and its length in tokens."""

    start: int
    end: int
    num_tokens: int

    @property
    def span(self) -> tuple[int, int]:
        """``(start, end)`` in characters."""
        return self.start, self.end


def draw_chunks(
    text: str,
    token_starts: NDArray[np.int64],
    document_id: str,
    *,
    min_tokens: int,
    max_tokens: int,
    max_chunks: int,
    seed: int,
) -> list[Chunk]:
    """At most ``max_chunks`` chunks of a document that do not overlap, in a drawn order.

    Args:
        text: The document.
        token_starts: The first character of each of its tokens, ascending, ``[T]``.
        document_id: With the seed it decides everything that is drawn.
        min_tokens, max_tokens: Length of a chunk. A chunk is never the whole document.
        max_chunks: How many to draw.
        seed: Of the run.

    Returns:
        None of them where the document is shorter than a chunk.
    """
    tiles = _tiles(text, token_starts, document_id, min_tokens, max_tokens, seed)
    return shuffled(tiles, seed, document_id, "chunks")[:max_chunks]


def _tiles(
    text: str, starts: NDArray[np.int64], document_id: str, min_tokens: int, max_tokens: int, seed: int
) -> Iterator[Chunk]:
    first = 0
    for number in range(len(starts)):
        remaining = len(starts) - first
        # A chunk is never the whole document.
        longest = min(max_tokens, len(starts) - 1)
        if remaining < min_tokens or longest < min_tokens:
            return
        if remaining <= longest:
            stop = len(starts)
        else:
            target = draw_between(min_tokens, longest, seed, document_id, "length", number)
            stop = first + _best_length(text, starts[first : first + longest + 1], min_tokens, target)
        chunk = _trimmed(text, starts, first, stop)
        if chunk is not None:
            yield chunk
        first = stop


def _best_length(text: str, starts: NDArray[np.int64], min_tokens: int, target: int) -> int:
    """Tokens of a chunk that begins with the first of ``starts`` and ends before the last of them at the latest: up to
    the best boundary, the one nearest to the target."""
    low, high, wanted = int(starts[min_tokens]), int(starts[-1]), int(starts[target])
    for cuts in _boundaries(text, low, high):
        if cuts:
            cut = min(cuts, key=lambda place: (abs(place - wanted), place))
            # The token that a boundary lies in goes to the next chunk.
            return min(max(int(np.searchsorted(starts, cut)), min_tokens), len(starts) - 1)
    return target


def _boundaries(text: str, low: int, high: int) -> Iterator[list[int]]:
    """Places to cut in ``[low, high]``, best kind first."""
    best: list[int] = []
    for rank, (pattern, behind) in enumerate(_CLASSES):
        matches = pattern.finditer(text, max(0, low - 2), high)
        places = [match.end() if behind else match.start() for match in matches]
        places = [place for place in places if low <= place <= high]
        if rank == 0:
            best = places
        elif rank == 1:
            yield sorted(best + places)
        else:
            yield places


def _trimmed(text: str, starts: NDArray[np.int64], first: int, stop: int) -> Chunk | None:
    """The chunk of tokens ``[first, stop)`` without the blank lines around it; None where nothing else is in it."""
    start = int(starts[first])
    end = int(starts[stop]) if stop < len(starts) else len(text)
    piece = text[start:end]
    leading = re.match(r"(?:[ \t]*\n)*", piece)
    start += leading.end() if leading else 0
    end = start + len(text[start:end].rstrip())
    num_tokens = int(np.searchsorted(starts, end) - np.searchsorted(starts, start))
    return Chunk(start, end, num_tokens) if start < end else None
