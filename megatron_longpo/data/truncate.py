"""Fitting over-long documents into a length by cutting from their middle; answers are never cut."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from megatron_longpo.data.chat_tokenizer import ChatTokenizer
from megatron_longpo.data.document import TokenizedDocument
from megatron_longpo.data.tokenize import DocumentTokenizer
from megatron_longpo.pairs import PreferenceDocument

_ATTEMPTS = 8
"""Cutting text can change the tokens at the seam, so a cut may have to be repeated with a little more."""


@dataclass(frozen=True)
class Cut:
    """A document that fits now.

    Args:
        document: Its tokens.
        tokens_cut: Tokens that it lost.
        turns_with_cut_chunk: Turns whose chunk is no longer in the document as a whole.
    """

    document: TokenizedDocument
    tokens_cut: int
    turns_with_cut_chunk: tuple[int, ...]


def cut_text(
    document: PreferenceDocument,
    tokenized: TokenizedDocument,
    max_tokens: int,
    tokenize: DocumentTokenizer,
    tokenizer: ChatTokenizer,
) -> Cut | None:
    """Cut the middle of a document's text until its longest conversation has at most ``max_tokens``.

    Returns:
        The cut document, or None when everything but the document is too long already.
    """
    tokens, starts, ends = tokenizer.encode(document.document)
    excess = tokenized.longest_sequence_tokens - max_tokens
    num_cut = excess
    for _ in range(_ATTEMPTS):
        num_kept = len(tokens) - num_cut
        if num_kept < 2:
            return None
        head = num_kept // 2
        start_char, stop_char = int(ends[head - 1]), int(starts[head + num_cut])
        text = document.document[:start_char] + document.document[stop_char:]
        result = tokenize(replace(document, document=text))
        over = result.longest_sequence_tokens - max_tokens
        if over <= 0:
            return Cut(
                result,
                tokenized.longest_sequence_tokens - result.longest_sequence_tokens,
                tuple(
                    number
                    for number, turn in enumerate(document.turns)
                    if turn.chunk_span and turn.chunk_span[0] < stop_char and turn.chunk_span[1] > start_char
                ),
            )
        num_cut += over
    return None


def cut_tokens(tokenized: TokenizedDocument, max_tokens: int) -> Cut | None:
    """The same for a document that came as tokens: cut the middle of what its conversations share."""
    excess = tokenized.longest_sequence_tokens - max_tokens
    num_kept = len(tokenized.document_tokens) - excess
    if num_kept < 2:
        return None
    head = num_kept // 2
    shared = np.concatenate([tokenized.document_tokens[:head], tokenized.document_tokens[head + excess :]])
    return Cut(replace(tokenized, document_tokens=shared), excess, ())
