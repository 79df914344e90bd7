"""Cutting over-long documents: the middle goes, the answers stay, and lost chunks are reported."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatron_longpo.data.chat_tokenizer import ChatTokenizer
from megatron_longpo.data.document import CHOSEN
from megatron_longpo.data.tokenize import DocumentTokenizer
from megatron_longpo.data.truncate import cut_text, cut_tokens
from megatron_longpo.pairs import PreferenceDocument, Turn
from tests.data.samples import random_document


@pytest.fixture
def document(text: str) -> PreferenceDocument:
    words = text[:6_000]
    spans = ((0, 100), (2_900, 3_100), (5_900, 6_000))
    turns = tuple(
        Turn(f"Question {i}?", f"Right answer {i}.", f"Wrong {i}.", words[slice(*span)], span)
        for i, span in enumerate(spans)
    )
    given_as_text = Turn("Question 3?", "Right answer 3.", "Wrong 3.", words[2_900:3_100])
    return PreferenceDocument("long", words, (*turns, given_as_text))


@pytest.mark.parametrize("share", [0.9, 0.5, 0.2])
def test_the_middle_of_the_document_goes(tokenizer: ChatTokenizer, document: PreferenceDocument, share: float) -> None:
    tokenize = DocumentTokenizer(tokenizer)
    whole = tokenize(document)
    limit = int(whole.longest_sequence_tokens * share)
    cut = cut_text(document, whole, limit, tokenize, tokenizer)
    assert cut is not None
    assert cut.document.longest_sequence_tokens == limit, "no more goes than must"
    assert cut.tokens_cut == whole.longest_sequence_tokens - cut.document.longest_sequence_tokens
    kept = tokenizer.decode(cut.document.document_tokens)
    assert document.document[:200] in kept and document.document[-200:] in kept
    assert cut.turns_with_cut_chunk == (1,)
    assert cut.document.joint is not None and whole.joint is not None
    for turn in range(4):
        assert np.array_equal(cut.document.joint[CHOSEN].response(turn), whole.joint[CHOSEN].response(turn))
    assert cut.document.short == whole.short


def test_a_document_that_cannot_fit_is_given_up(tokenizer: ChatTokenizer, document: PreferenceDocument) -> None:
    tokenize = DocumentTokenizer(tokenizer)
    assert cut_text(document, tokenize(document), 20, tokenize, tokenizer) is None


def test_a_seam_that_makes_more_tokens_is_cut_further(
    sentencepiece_tokenizer: ChatTokenizer, document: PreferenceDocument
) -> None:
    tokenize = DocumentTokenizer(sentencepiece_tokenizer)
    whole = tokenize(document)
    limit = whole.longest_sequence_tokens - 10
    seams = iter(["one two three", ""])
    cut = cut_text(
        document,
        whole,
        limit,
        lambda cut: tokenize(replace(cut, document=cut.document + next(seams))),
        sentencepiece_tokenizer,
    )
    assert cut is not None and cut.document.longest_sequence_tokens <= limit and next(seams, None) is None
    # It does not go on for ever.
    assert cut_text(document, whole, limit, lambda cut: whole, sentencepiece_tokenizer) is None


def test_documents_that_came_as_tokens() -> None:
    document = random_document(0, prefix=40)
    cut = cut_tokens(document, document.longest_sequence_tokens - 7)
    assert cut is not None
    expected = [*document.document_tokens[:16].tolist(), *document.document_tokens[23:].tolist()]
    assert cut.document.document_tokens.tolist() == expected
    assert cut.document == replace(document, document_tokens=cut.document.document_tokens)
    least = cut_tokens(document, document.longest_sequence_tokens - 38)
    assert least is not None and len(least.document.document_tokens) == 2
    assert cut_tokens(document, document.longest_sequence_tokens - 39) is None
