"""Words, similarity and marked differences."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_longpo.inspection.words import (
    MAX_COMPARED_WORDS,
    marked_differences,
    num_words,
    similarity,
    words,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It's snake_case, 3.5 times!", ["it", "s", "snake_case", "3", "5", "times"]),
        ("長い文書 and カナ", ["長", "い", "文", "書", "and", "カ", "ナ"]),
        ("Über-Größe", ["über", "größe"]),
        ("… --- !", []),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert words(text) == expected and num_words(text) == len(expected)


def test_similarity_is_dice_over_counted_words() -> None:
    assert similarity(["a", "b", "b", "c"], ["b", "c", "d"]) == pytest.approx(2 * 2 / 7)
    assert similarity(["a"], ["a"]) == 1.0 and similarity(["a"], ["b"]) == 0.0
    assert similarity(["a", "b"], ["b", "a"]) == 1.0
    assert similarity([], []) == 1.0 and similarity([], ["a"]) == 0.0


@given(st.lists(st.integers(0, 5)), st.lists(st.integers(0, 5)))
def test_similarity_is_symmetric_and_at_most_one(first: list[int], second: list[int]) -> None:
    assert similarity(first, second) == similarity(second, first) <= 1
    assert (similarity(first, second) == 1) == (Counter(first) == Counter(second))


@given(st.text(max_size=60), st.text(max_size=60))
def test_marked_runs_are_the_texts(first: str, second: str) -> None:
    for text, runs in zip((first, second), marked_differences(first, second), strict=True):
        assert "".join(run for run, _ in runs) == text
        assert all(run for run, _ in runs)


def test_differing_words_are_marked_and_chance_is_not_spared() -> None:
    first, second = marked_differences("It runs once, at import time.", "It runs more than once, at import time.")
    assert not any(differs for _, differs in first)
    assert [run for run, differs in second if differs] == ["more than"]
    first, _ = marked_differences("red of green, and all that is left", "blue of black, and all that is left")
    assert first[0] == ("red of green", True)
    long = "word " * (MAX_COMPARED_WORDS + 1)
    assert marked_differences(long, "x") == ([(long, False)], [("x", False)])
