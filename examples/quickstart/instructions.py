"""Chunks of a document and exercises about them, drawn by (seed, document id).

Exercises teach the small model, during pre-training, what its part in the making of pairs is: to write instructions
about a chunk, and to follow them. Every one has a mechanical answer; the preference pairs never contain it: there the
model answers by itself.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from examples.quickstart.corpus import Document
from megatron_longpo.generation.draw import draw, draw_between
from megatron_longpo.generation.prompts import PromptWriter

MIN_CHUNK_CHARS, MAX_CHUNK_CHARS = 250, 600
MAX_LISTED = 5


INSTRUCTION_TEMPLATE = Path(__file__).with_name("instruction_template.txt")
NUM_INSTRUCTIONS = 2


@dataclass(frozen=True)
class Exercise:
    """What the user says, a chunk included, and the mechanical answer."""

    message: str
    answer: str


def draw_exercises(document: Document, seed: int, num_chunks: int) -> Iterator[Exercise]:
    """For each of some drawn chunks: to write instructions about it, and to follow one of them."""
    prompts = PromptWriter(INSTRUCTION_TEMPLATE.read_text(encoding="utf-8"), NUM_INSTRUCTIONS, seed)
    for number in range(num_chunks):
        start, stop = _draw_chunk(document, seed, number)
        chunk = document.text[start:stop]
        exercises = _exercises(document, chunk)
        listed = "\n".join(f"{place}. {instruction}" for place, (instruction, _) in enumerate(exercises, 1))
        yield Exercise(prompts.pool_request(chunk, document.id, number), listed)
        fitting = [(instruction, answer) for instruction, answer in exercises if answer]
        # The drawn instruction first, then the others in turn, so that a document is not asked the same twice in a row.
        instruction, answer = fitting[(draw(seed, document.id, "instruction") + number) % len(fitting)]
        yield Exercise(f"{chunk}\n\n{prompts.phrase(document.id, number)}{instruction}", answer)


def _draw_chunk(document: Document, seed: int, number: int) -> tuple[int, int]:
    """A span of whole lines of MIN_CHUNK_CHARS..MAX_CHUNK_CHARS characters, shorter where the document is."""
    length = draw_between(MIN_CHUNK_CHARS, MAX_CHUNK_CHARS, seed, document.id, number, "length")
    start = draw(seed, document.id, number, "start") % max(1, len(document.text) - length)
    start = document.text.rfind("\n", 0, start) + 1
    stop = min(len(document.text), start + length)
    if stop < len(document.text) and (line_end := document.text.rfind("\n", start, stop)) > start:
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
