"""Chunks of a document and instructions about them, drawn by (seed, document id).

Every instruction has a mechanical answer. The answers teach the small model, during pre-training, what an instruction
is; the preference pairs never contain them: there the model answers by itself.
"""

from __future__ import annotations

import keyword
import re
from dataclasses import dataclass

from examples.quickstart.corpus import Document, draw

MIN_CHUNK_CHARS, MAX_CHUNK_CHARS = 250, 600
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
    fitting = [(instruction, answer) for instruction, answer in _exercises(document, chunk) if answer]
    if not fitting:
        return None
    # The drawn instruction first, then the others in turn, so that a document is not asked the same twice in a row.
    instruction, answer = fitting[(draw(seed, document.id, "instruction") + number) % len(fitting)]
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


def _exercises(document: Document, chunk: str) -> list[tuple[str, str]]:
    """(instruction, answer) for a chunk; the answer is empty where the instruction does not fit.

    A tiny model cannot copy names that it never saw, but it can tell a module by its words and name keywords.
    """
    name = document.id.split("/", 1)[1].split("#")[0].removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    words = list(dict.fromkeys(word for word in re.findall(r"\w+", chunk) if keyword.iskeyword(word)))[:MAX_LISTED]
    if document.kind == "source":
        return [
            ("Which module is this code from?", f"It is from the module {name}."),
            ("Which keywords does this code use?", _listing("It uses", words)),
        ]
    return [
        ("Which section is this passage from?", f"It is from the section {name}."),
        ("Which keywords does this passage mention?", _listing("It mentions", words)),
    ]


def _listing(verb: str, words: list[str]) -> str:
    if not words:
        return ""
    return f"{verb} {' and '.join(filter(None, [', '.join(words[:-1]), words[-1]]))}."
