"""Encoding many long texts that begin alike at the price of one.

The conversations of a document differ in their last few thousand characters only: ten of them for four turns. Encoding
each from scratch would cost ten times the document. Here a text that begins like the last one keeps that one's tokens
up to shortly before the first difference, and only the rest is encoded.

Tokens depend on the text around them, so the rest is encoded with context before it, and the two token sequences must
agree on a stretch in between, id by id and character by character; where they do not, the whole text is encoded. (A
unigram tokenizer may cut a tie, such as a run of one character, differently depending on where it started; both cuts
are equally probable.)

    last text    |--- tokens kept ------------|= must agree =|-- (unused)
    this text              |-- (unused: cut) -|= must agree =|-- encoded again ---|
                           c                c + M          L - M   L = first difference
"""

from __future__ import annotations

import numpy as np

from megatron_longpo.data.chat_tokenizer import ChatTokenizer, Offsets
from megatron_longpo.data.document import Tokens

MARGIN_CHARS = 2048
"""M: how far a cut or a difference may influence tokens. Pre-tokens (words, runs of blanks) are far shorter."""

STRETCH_CHARS = 4096
"""Length of the stretch on which both encodings must agree."""


class SharedPrefixEncoder:
    """Encodes texts; a text that begins like the one before it costs only its own end."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self._text = ""
        self._encoded: tuple[Tokens, Offsets, Offsets] | None = None

    def encode(self, text: str) -> tuple[Tokens, Offsets, Offsets]:
        """Same as the tokenizer's `encode`."""
        encoded = self._encode_end(text) or self._tokenizer.encode(text)
        self._text, self._encoded = text, encoded
        return encoded

    def _encode_end(self, text: str) -> tuple[Tokens, Offsets, Offsets] | None:
        shared = common_prefix_chars(self._text, text)
        if self._encoded is None or shared < 4 * (2 * MARGIN_CHARS + STRETCH_CHARS):
            return None
        ids, starts, ends = self._encoded
        # Cut at the start of a token of the last text, so that both encodings can have a boundary there.
        cut = int(starts[np.searchsorted(starts, shared - STRETCH_CHARS - 2 * MARGIN_CHARS)])
        new_ids, new_starts, new_ends = self._tokenizer.encode(text[cut:])
        new_starts, new_ends = new_starts + cut, new_ends + cut

        first, stop = cut + MARGIN_CHARS, shared - MARGIN_CHARS
        old = slice(*np.searchsorted(starts, (first, stop)).tolist())
        new = slice(*np.searchsorted(new_starts, (first, stop)).tolist())
        agree = (
            old.stop > old.start
            and np.array_equal(ids[old], new_ids[new])
            and np.array_equal(starts[old], new_starts[new])
            and np.array_equal(ends[old], new_ends[new])
        )
        if not agree:
            return None
        return (
            np.concatenate([ids[: old.start], new_ids[new.start :]]),
            np.concatenate([starts[: old.start], new_starts[new.start :]]),
            np.concatenate([ends[: old.start], new_ends[new.start :]]),
        )


def common_prefix_chars(first: str, second: str) -> int:
    """Number of leading characters that two texts share, by bisection: comparing slices runs at memory speed."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
