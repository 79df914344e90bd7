"""Chunks: within their limits, apart, at boundaries, and drawn by (seed, document id) alone."""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_longpo.generation.chunking import Chunk, draw_chunks


def word_starts(text: str) -> np.ndarray:
    """Words as tokens."""
    return np.array([match.start() for match in re.finditer(r"\S+\s*", text)], dtype=np.int64)


def chunks(text: str, low: int, high: int, most: int = 100, seed: int = 0, id: str = "a") -> list[Chunk]:
    return draw_chunks(text, word_starts(text), id, min_tokens=low, max_tokens=high, max_chunks=most, seed=seed)


TEXTS = st.lists(
    st.sampled_from(["word", "longer words", "\n", "\n\n", "# Title\n", "def f():\n", "end.", " "]), max_size=200
)


@given(TEXTS.map(" ".join), st.integers(1, 20), st.integers(0, 20), st.integers(1, 5), st.integers(0, 9))
def test_chunks_lie_apart_within_their_limits(text: str, low: int, more: int, most: int, seed: int) -> None:
    starts = word_starts(text)
    found = chunks(text, low, low + more, most, seed)
    assert len(found) <= most
    ordered = sorted(found, key=lambda chunk: chunk.start)
    for one, other in pairwise(ordered):
        assert one.end <= other.start
    for chunk in found:
        assert 0 <= chunk.start < chunk.end <= len(text)
        assert low <= chunk.num_tokens <= low + more
        assert chunk.num_tokens < len(starts)
        assert chunk.num_tokens == int(((starts >= chunk.start) & (starts < chunk.end)).sum())
        assert text[chunk.start : chunk.end] == text[chunk.start : chunk.end].rstrip()
    assert found == chunks(text, low, low + more, most, seed)


def test_all_tiles_cover_the_document() -> None:
    text = " ".join(f"w{i}" for i in range(1000))
    found = sorted(chunks(text, 50, 90), key=lambda chunk: chunk.start)
    assert found[0].start == 0
    assert sum(chunk.num_tokens for chunk in found) > 1000 - 50
    for one, other in pairwise(found):
        assert text[one.end : other.start].strip() == ""


def test_blank_lines_around_a_chunk_are_not_counted() -> None:
    text = ("x" * 40 + "\n" * 30) * 20
    found = draw_chunks(text, np.arange(len(text)), "a", min_tokens=60, max_tokens=80, max_chunks=100, seed=0)
    assert len(found) > 15
    assert all(chunk.num_tokens == chunk.end - chunk.start for chunk in found)


def test_the_draw_depends_on_seed_and_id() -> None:
    text = " ".join(f"w{i}" for i in range(2000))
    drawn = {tuple(chunks(text, 50, 90, 4, seed, id)) for seed in (0, 1) for id in ("a", "b")}
    assert len(drawn) == 4
    starts = [chunk.start for chunk in chunks(text, 50, 90, 10)]
    assert starts != sorted(starts)  # turns are not asked from front to back


def filler(words: int) -> str:
    return " ".join(["word"] * words)


@pytest.mark.parametrize(
    ("boundary", "before"),
    [
        ("\\section{Results}\n", "\n\nA paragraph that must not be taken.\n\n"),
        ("\\subsection*{More}\n", "\n\nA paragraph.\n\n"),
        ("## Results\n", "\n\nA paragraph.\n\n"),
        ("Results\n=======\n", "\n\nA paragraph.\n\n"),
        ("def work():\n    pass\n", "\n\n    indented = 1\n\n"),
        ("@cached\ndef work():\n    pass\n", "\n\n    indented = 1\n\n"),
        ("class Work:\n    pass\n", "\n\n    indented = 1\n\n"),
        ("pub async fn work() {\n}\n", "\n\n    let x = 1;\n\n"),
        ("func Work() {\n}\n", "\n\n    x := 1\n\n"),
        ("export function work() {\n}\n", "\n\n    x = 1\n\n"),
    ],
)
def test_sections_and_functions_come_before_paragraphs(boundary: str, before: str) -> None:
    text = filler(30) + before + filler(10) + "\n\n" + boundary + filler(60)
    first = min(chunks(text, 25, 60), key=lambda chunk: chunk.start)
    assert text[first.end :].lstrip("\n").startswith(boundary)


def test_paragraphs_come_before_lines_and_lines_before_sentences() -> None:
    paragraph = filler(30) + ".\nA line. " + filler(5) + "\n\nNext " + filler(60)
    for text, expected in (
        (paragraph, "\n\nNext"),
        (filler(30) + ". Sentence " + filler(5) + "\nLine " + filler(60), "\nLine"),
        (filler(30) + ". Sentence " + filler(60), " Sentence"),
    ):
        first = min(chunks(text, 25, 50), key=lambda chunk: chunk.start)
        assert text[first.end :].startswith(expected)


def test_text_without_any_boundary_is_cut_between_tokens() -> None:
    text = filler(500)
    found = chunks(text, 50, 60)
    assert found
    assert all(text[chunk.start : chunk.end].split() == ["word"] * chunk.num_tokens for chunk in found)


def test_a_chunk_is_never_the_whole_document() -> None:
    assert len(chunks(filler(40), 10, 50)) >= 2
    assert chunks(filler(40), 40, 50) == []
    assert chunks(filler(40), 39, 50) != []
    assert chunks(filler(9), 10, 50) == []
