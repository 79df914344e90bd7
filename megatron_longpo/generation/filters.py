"""Why an answer is dropped: empty, refused, repetitive, cut off, in a wrong language, or equal to its twin."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from megatron_longpo.generation.engine import Answer
from megatron_longpo.generation.language import same_language

_NGRAM = 4
_MIN_NGRAMS = 20
"""Shorter answers repeat themselves by chance."""

_NO_BLANKS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Scripts without blanks between words: Thai, Lao, Burmese, Khmer, kana, Chinese characters."""

_WORD = re.compile(rf"[{_NO_BLANKS}]|[^\W_{_NO_BLANKS}]+|[^\w\s]")

_REFUSAL = re.compile(
    r"^\W*(?:(?:i[’']?m|i am|we[’']?re|we are|my apologies|i apologi[sz]e)?\W*(?:very |so |really |terribly )?"
    r"(?:sorry|afraid|apologies|i apologi[sz]e|unfortunately|regrettably)\b[^.!?\n]{0,60}?\b)?\s*(?:but |that |,\s*)*"
    r"(?:(?:as|being) an? (?:ai|artificial intelligence|(?:large )?language model)(?: \w+){0,2},? (?:i|we)\b"
    r"|(?:i|we)(?: am|[’']m| are|[’']re)? (?:can(?:not|[’']?t)|could(?: not|n[’']?t)|won[’']?t|will not|unable to"
    r"|not able to|not allowed to|not comfortable|do(?: not|n[’']?t) (?:have access|feel comfortable))\b"
    r"|(?:i|we) (?:must|have to) (?:decline|refuse)"
    r"|(?:this|the|your) (?:request|content|question|text|passage) (?:is|was|has been|violates|contains|goes) "
    r"(?:against|inappropriate|harmful|blocked|censored|content that|my |our ))",
    re.IGNORECASE,
)
_REFUSAL_OTHER = re.compile(
    r"^\W*(?:很?抱歉|对不起|作为一?个?(?:人工智能|AI|语言模型)|我无法|我不能|申し訳|죄송"
    r"|es tut mir leid|als ki\b|je suis désolé|lo siento)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class AnswerFilter:
    """The filters of a run.

    Args:
        names: Those in use; names of `settings.FILTERS`.
        max_repetition: Highest share of word 4-grams that occurred in the answer before.
    """

    names: Collection[str]
    max_repetition: float

    def problem(self, answer: Answer, *references: str) -> str | None:
        """Why an answer cannot be used, or None.

        Args:
            answer: What the model said.
            references: Texts whose language it should have.
        """
        text = answer.text.strip()
        if answer.broken_off:
            return answer.broken_off
        if not text:
            return "empty"
        checks = {
            "length": lambda: answer.cut_off,
            "refusal": lambda: is_refusal(text),
            "repetition": lambda: repetition(text) > self.max_repetition,
            "language": lambda: not same_language(text, *references),
        }
        return next((name for name, applies in checks.items() if name in self.names and applies()), None)


def is_refusal(text: str) -> bool:
    """Whether an answer begins by declining to answer."""
    beginning = text[:400]
    return bool(_REFUSAL.match(beginning) or _REFUSAL_OTHER.match(beginning))


def repetition(text: str) -> float:
    """The share of an answer's word 4-grams that occurred in it before; 0 for short answers.

    In scripts without blanks between words every character is a word.
    """
    words = _WORD.findall(text.casefold())
    ngrams = [tuple(words[i : i + _NGRAM]) for i in range(len(words) - _NGRAM + 1)]
    if len(ngrams) < _MIN_NGRAMS:
        return 0.0
    return 1.0 - len(set(ngrams)) / len(ngrams)
