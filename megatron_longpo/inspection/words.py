"""Words of a text, how alike two texts are by them, and which of them differ."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

_SINGLE = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_SINGLE}]|[^\W{_SINGLE}]+")
_PIECE = re.compile(rf"(?:[{_SINGLE}]|[^\W{_SINGLE}]+|[^\w\s])\s*|\s+")

MAX_COMPARED_WORDS = 2_000
"""Aligning two texts takes time with the product of their lengths; longer ones are not marked."""


def words(text: str) -> list[str]:
    """Runs of letters and digits in lower case; Chinese and Japanese characters count as a word each."""
    return [word.lower() for word in _WORD.findall(text)]


def num_words(text: str) -> int:
    """How many `words` a text has, without keeping them."""
    return sum(1 for _ in _WORD.finditer(text))


def similarity(first: Iterable[Hashable], second: Iterable[Hashable]) -> float:
    """The share of words that two texts have in common, each as often as both have it: Dice's 2 |A ∩ B| / (|A| + |B|).

    1 for the same words in any order, 0 for none in common. Linear in the lengths, unlike an alignment.
    """
    one, two = Counter(first), Counter(second)
    total = one.total() + two.total()
    return 2 * (one & two).total() / total if total else 1.0


def marked_differences(first: str, second: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Both texts in runs, each with whether the other text lacks it at that place; joined they are the texts again."""
    one, two = _PIECE.findall(first), _PIECE.findall(second)
    if max(len(one), len(two)) > MAX_COMPARED_WORDS:
        return [(first, False)], [(second, False)]
    keys = [[piece.strip() for piece in pieces] for pieces in (one, two)]
    codes = difflib.SequenceMatcher(None, *keys).get_opcodes()
    return (
        _runs([("".join(one[a:b]), tag != "equal") for tag, a, b, _, _ in codes]),
        _runs([("".join(two[c:d]), tag != "equal") for tag, _, _, c, d in codes]),
    )


def _runs(pieces: Sequence[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """Without empty ones, and without blanks at the end of what differs."""
    runs = []
    for text, differs in pieces:
        kept = len(text.rstrip()) if differs else len(text)
        runs += [(text[:kept], differs), (text[kept:], False)]
    return [(text, differs) for text, differs in runs if text]
