"""Chunks of a document and instructions about them, drawn by (seed, document id).

Every instruction has a mechanical answer. The answers teach the small model, during pre-training, what an instruction
is; the preference pairs never contain them: there the model answers by itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from examples.quickstart.corpus import Document, draw

MIN_CHUNK_CHARS, MAX_CHUNK_CHARS = 450, 1000
MAX_LISTED = 5


@dataclass(frozen=True)
class Exercise:
    """An instruction about a chunk of a document, and its mechanical answer."""

    chunk_span: tuple[int, int]  # character offsets in the document
    instruction: str
    answer: str


def draw_exercise(document: Document, seed: int, number: int, bounds: tuple[int, int] | None = None) -> Exercise | None:
    """Draw a chunk and an instruction that fits it.

    Args:
        document: Where the chunk is cut from.
        seed: With the document's id and `number`, decides everything.
        number: Which of the document's exercises this is.
        bounds: Character offsets within which the chunk must lie; None for the whole document.

    Returns:
        None when no instruction fits the chunk.
    """
    start, stop = _draw_chunk(document, seed, number, *(bounds or (0, len(document.text))))
    chunk = document.text[start:stop]
    fitting = [(instruction, answer) for instruction, answer in _exercises(document.kind, chunk) if answer]
    if not fitting:
        return None
    instruction, answer = fitting[draw(seed, document.id, number, "instruction") % len(fitting)]
    return Exercise((start, stop), instruction, answer)


def _draw_chunk(document: Document, seed: int, number: int, lower: int, upper: int) -> tuple[int, int]:
    """A span of whole lines of MIN_CHUNK_CHARS..MAX_CHUNK_CHARS characters, shorter where the bounds are narrower."""
    length = MIN_CHUNK_CHARS + draw(seed, document.id, number, "length") % (MAX_CHUNK_CHARS - MIN_CHUNK_CHARS)
    start = lower + draw(seed, document.id, number, "start") % max(1, upper - lower - length)
    start = document.text.rfind("\n", lower, start) + 1 or lower
    stop = min(upper, start + length)
    if stop < upper and (line_end := document.text.rfind("\n", start, stop)) > start:
        stop = line_end
    return start, stop


def _exercises(kind: str, chunk: str) -> list[tuple[str, str]]:
    """(instruction, answer) for a chunk; the answer is empty where the instruction does not fit."""
    if kind == "source":
        return [
            ("Which functions and classes does this code define?", _listing("It defines", r"(?:def|class) (\w+)", chunk)),
            ("Which names does this code assign?", _listing("It assigns", r"^ *([a-z]\w*) = ", chunk)),
            ("What does this code do? Answer in one sentence.", _first(r'"""\s*([A-Z][^"]{20,120}?\.)\s', chunk)),
        ]
    return [
        ("Summarise this passage in one sentence.", _first(r"(?:^|\n\n|\. )([A-Z][a-z ][^:\n]{10,60}\n?[^:\n]{0,70}\.)\s", chunk)),
        ("Which words does this passage quote?", _listing("It quotes", r'"(\w+)"', chunk)),
    ]


def _listing(verb: str, pattern: str, chunk: str) -> str:
    found = list(dict.fromkeys(re.findall(pattern, chunk, re.MULTILINE)))[:MAX_LISTED]
    if not found:
        return ""
    return f"{verb} {' and '.join(filter(None, [', '.join(found[:-1]), found[-1]]))}."


def _first(pattern: str, chunk: str) -> str:
    found = re.search(pattern, chunk)
    return " ".join(found.group(1).split()) if found else ""
