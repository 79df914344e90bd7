"""Telling the language of a text, where that can be told with confidence.

py3langid (a maintained port of langid.py) names the language; the model ships with the package and nothing is
downloaded. Scripts are compared as well: they decide for texts that are too short for a language.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import lru_cache
from typing import Any

MIN_WORDS = 12
"""Below, a language is not guessed."""

MIN_PROBABILITY = 0.99
_SAMPLE_CHARS = 400
_VOCABULARY_CHARS = 4000
_MIN_LETTERS = 20
_WORD = re.compile(r"\w+")

_SAME_SCRIPT = {"HIRAGANA": "CJK", "KATAKANA": "CJK", "FULLWIDTH": "LATIN"}


def same_language(answer: str, *references: str) -> bool:
    """Whether an answer is in the script and language of one of the references, or no difference can be told.

    Args:
        answer: Its beginning decides.
        references: Texts that it may follow: the chunk, the instruction.
    """
    words = _words(answer[:_SAMPLE_CHARS])
    # An answer about a text mostly uses its words. This is told a hundred times faster than a language.
    if any(2 * len(words & _words(text[:_VOCABULARY_CHARS])) >= len(words) for text in references):
        return True
    own = _script_and_language(answer[:_SAMPLE_CHARS])
    return any(_may_be_same(own, _script_and_language(text[:_SAMPLE_CHARS])) for text in references)


def load_model() -> None:
    """Load what names languages, now rather than at the first answer that needs it."""
    _identifier()


# A chunk is the reference of its chosen and of its rejected answer.
@lru_cache(maxsize=512)
def _words(sample: str) -> frozenset[str]:
    return frozenset(_WORD.findall(sample.casefold()))


def _may_be_same(one: tuple[str | None, str | None], other: tuple[str | None, str | None]) -> bool:
    return all(a is None or b is None or a == b for a, b in zip(one, other, strict=True))


@lru_cache(maxsize=512)
def _script_and_language(sample: str) -> tuple[str | None, str | None]:
    language = None
    if len(sample.split()) >= MIN_WORDS:
        name, probability = _identifier().classify(sample)
        language = str(name) if probability >= MIN_PROBABILITY else None
    return _script(sample), language


def _script(sample: str) -> str | None:
    """The script of most letters, by the first word of their Unicode names."""
    letters = "".join(filter(str.isalpha, sample))
    if len(letters) < _MIN_LETTERS:
        return None
    if letters.isascii():
        return "LATIN"
    names = Counter(unicodedata.name(letter, "UNKNOWN").split(" ")[0] for letter in letters)
    counts: Counter[str] = Counter()
    for name, count in names.items():
        counts[_SAME_SCRIPT.get(name, name)] += count
    script, count = counts.most_common(1)[0]
    return script if count > 0.7 * len(letters) else None


@lru_cache(maxsize=1)
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
