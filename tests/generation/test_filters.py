"""Answers that are dropped, and answers that only look like it."""

from __future__ import annotations

import pytest

from megatron_longpo.generation.engine import Answer
from megatron_longpo.generation.filters import AnswerFilter, is_refusal, repetition
from megatron_longpo.generation.settings import FILTERS

ENGLISH = "The author compares two methods and finds that the second is faster, though it needs more memory."
GERMAN = (
    "Der Autor vergleicht zwei Verfahren und stellt fest, dass das zweite schneller ist, aber mehr Speicher braucht."
)
CHINESE = "作者比较了两种方法，发现第二种更快，但是需要更多的内存，并且在长文本上表现得更好。"
JAPANESE = "これは長い文書の要約であり、著者は二つの方法を比較して、二番目の方法がより速いことを示している。"
THAI = "ผู้เขียนเปรียบเทียบสองวิธีและพบว่าวิธีที่สองเร็วกว่า แม้จะใช้หน่วยความจำมากขึ้น"

REFUSALS = [
    "I'm sorry, but I can't assist with that.",
    "I’m sorry, I cannot answer this question based on the text.",
    "Sorry, I am unable to help.",
    "I cannot provide a summary of this content.",
    "Unfortunately, I can't do that.",
    "As an AI language model, I do not have opinions.",
    "I must decline to answer.",
    "I apologize, but I am not able to answer.",
    "This content violates our policy.",
    "对不起，我无法回答这个问题。",
    "Es tut mir leid, aber das kann ich nicht.",
]
NO_REFUSALS = [
    ENGLISH,
    "The text says that he cannot swim.",
    "I can explain this in three steps.",
    "Sorry is what the hero says most often in this chapter.",
    "Unfortunately, the bridge was closed in 1932, so that trains took the longer way.",
    "As an AI researcher, the author trusts benchmarks less than her colleagues do.",
]


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals(text: str) -> None:
    assert is_refusal(text)


@pytest.mark.parametrize("text", NO_REFUSALS)
def test_no_refusals(text: str) -> None:
    assert not is_refusal(text)


def test_repetition() -> None:
    assert repetition(ENGLISH) == 0
    assert repetition("the same words again and " * 30) > 0.9
    assert repetition("作者比较了两种方法。" * 20) > 0.8
    assert repetition(CHINESE) < 0.1
    assert repetition(CHINESE * 2) > 0.45 and repetition(JAPANESE * 3) > 0.6 and repetition(THAI * 3) > 0.6
    assert repetition(JAPANESE) < 0.1 and repetition(THAI) < 0.1
    assert repetition("yes " * 10) == 0, "short answers are not judged"
    # Ten distinct sentences, each said twice: half of the 4-grams, about.
    twice = " ".join(f"sentence number {i} speaks of topic {i * 7} at length." for i in range(10)) + " "
    assert 0.4 < repetition(twice * 2) < 0.6


def problem(
    text: str, reference: str = ENGLISH, cut_off: bool = False, names: tuple[str, ...] = tuple(FILTERS)
) -> str | None:
    return AnswerFilter(names, 0.4).problem(Answer(text, cut_off), reference)


def test_each_problem_has_its_name() -> None:
    assert problem(ENGLISH) is None
    assert problem(" \n") == "empty"
    assert problem(ENGLISH, cut_off=True) == "length"
    assert problem(REFUSALS[0]) == "refusal"
    assert problem("so it goes on and on " * 30) == "repetition"
    assert problem(GERMAN) == "language"
    assert problem(CHINESE) == "language"
    assert problem(ENGLISH, GERMAN) == "language"
    assert problem(GERMAN, GERMAN) is None
    assert problem(CHINESE, CHINESE) is None


def test_short_answers_and_code_have_no_language() -> None:
    assert problem("Ja.") is None
    assert problem("Paris.", GERMAN) is None
    assert problem("def f(x):\n    return [y for y in x if y]", ENGLISH) is None


def test_filters_can_be_left_out() -> None:
    assert problem(GERMAN, names=("length",)) is None
    assert problem(REFUSALS[0], names=()) is None
    assert problem("", names=()) == "empty"
