"""Telling the language of a text, where that can be told with confidence.

py3langid (a maintained port of langid.py) names the language; the model ships with the package and nothing is
downloaded. Scripts are compared as well: they decide for texts that are too short for a language.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from functools import lru_cache
from typing import Any

MIN_WORDS = 12
"""Below, a language is not guessed."""

MIN_PROBABILITY = 0.99
_SAMPLE_CHARS = 4000
_MIN_LETTERS = 20

_SAME_SCRIPT = {"HIRAGANA": "CJK", "KATAKANA": "CJK", "HANGUL": "HANGUL", "FULLWIDTH": "LATIN"}


def same_language(answer: str, *references: str) -> bool:
    """Whether an answer is in the language and script of one of the references, or no difference can be told.

    Args:
        answer: Its first characters decide.
        references: Texts that it may follow: the chunk, the instruction.
    """
    script = _script(answer)
    scripts = {_script(text) for text in references}
    if script is not None and scripts and None not in scripts and script not in scripts:
        return False
    language = _language(answer)
    languages = {_language(text) for text in references}
    return language is None or None in languages or language in languages


def _script(text: str) -> str | None:
    """The script of most letters, by the first word of their Unicode names."""
    counts: Counter[str] = Counter()
    for letter in filter(str.isalpha, text[:_SAMPLE_CHARS]):
        name = "LATIN" if letter.isascii() else unicodedata.name(letter, "UNKNOWN").split(" ")[0]
        counts[_SAME_SCRIPT.get(name, name)] += 1
    if sum(counts.values()) < _MIN_LETTERS:
        return None
    script, count = counts.most_common(1)[0]
    return script if count > 0.7 * sum(counts.values()) else None


def _language(text: str) -> str | None:
    sample = text[:_SAMPLE_CHARS]
    if len(sample.split()) < MIN_WORDS:
        return None
    language, probability = _identifier().classify(sample)
    return str(language) if probability >= MIN_PROBABILITY else None


@lru_cache(maxsize=1)
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # type: ignore[import-untyped]

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
