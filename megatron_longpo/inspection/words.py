"""Words of a text, how alike two texts are by them, and which of them differ."""

from __future__ import annotations

import difflib
import itertools
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

_SINGLE = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_SINGLE}]|[^\W{_SINGLE}]+")
_PIECE = re.compile(rf"(?:[{_SINGLE}]|[^\W{_SINGLE}]+|[^\w\s])\s*|\s+")

MAX_COMPARED_WORDS = 2_000
"""Aligning two texts takes time with the product of their lengths; longer ones are not marked."""


MIN_COMMON_WORDS = 3
"""Shorter runs of common words between others are not told apart from these."""


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
    codes = difflib.SequenceMatcher(None, keys[0], keys[1]).get_opcodes()
    # A word or two in common between words that differ are chance mostly, and make the rest harder to read.
    equal = [
        tag == "equal" and (b - a >= MIN_COMMON_WORDS or number in (0, len(codes) - 1))
        for number, (tag, a, b, _, _) in enumerate(codes)
    ]
    return (
        _runs([("".join(one[a:b]), not same) for (_, a, b, _, _), same in zip(codes, equal, strict=True)]),
        _runs([("".join(two[c:d]), not same) for (_, _, _, c, d), same in zip(codes, equal, strict=True)]),
    )


def _runs(pieces: Sequence[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """Without empty ones, and without blanks at the end of what differs."""
    merged = [
        ("".join(text for text, _ in group), differs) for differs, group in itertools.groupby(pieces, lambda p: p[1])
    ]
    runs: list[tuple[str, bool]] = []
    for text, differs in merged:
        kept = len(text.rstrip()) if differs else len(text)
        runs += [(text[:kept], differs), (text[kept:], False)]
    return [(text, differs) for text, differs in runs if text]
