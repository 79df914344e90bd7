"""What one document is after tokenization: shared tokens, the branches behind them, and the short prompts.

Nothing here knows of text, of files or of torch: `tokenize.py` makes these objects, `records.py` stores them, `rows.py`
turns them into training rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]
"""Token ids, one dimension."""

CHOSEN, REJECTED = 0, 1
"""The roles of a branch; the numbers are part of the response-slot encoding and of the file format."""

ROLE_NAMES = ("chosen", "rejected")

TURNS = ("joint", "independent")
"""Values of ``--turns``: one conversation over all turns per role, or every turn on its own."""


@dataclass(frozen=True, eq=False)
class Branch:
    """The tokens of one conversation behind what it shares with others.

    Args:
        tokens: int32 ``[R]``.
        spans: One ``(turn, start, end)`` per response in the branch: ``tokens[start:end]`` is the response of that
            turn. Everything outside of spans is prompt (later instructions, template markers).
    """

    tokens: Tokens
    spans: tuple[tuple[int, int, int], ...]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Branch) and self.spans == other.spans and np.array_equal(self.tokens, other.tokens)

    def response(self, turn: int) -> Tokens:
        """The response tokens of one turn: int32 ``[end - start]``."""
        for number, start, end in self.spans:
            if number == turn:
                return self.tokens[start:end]
        raise KeyError(turn)


BranchPair = tuple[Branch, Branch]
"""(chosen, rejected)."""


@dataclass(frozen=True, eq=False)
class ShortPrompt:
    """One turn alone on its own chunk, as the reference model sees it: x_S and its two responses."""

    prefix_tokens: Tokens
    chosen: Branch
    rejected: Branch

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, ShortPrompt)
            and np.array_equal(self.prefix_tokens, other.prefix_tokens)
            and (self.chosen, self.rejected) == (other.chosen, other.rejected)
        )


@dataclass(frozen=True, eq=False)
class TokenizedDocument:
    """One document with its turns as tokens.

    Args:
        id: The sample's id in the pairs file.
        document_tokens: int32 ``[P]``, the tokens that every long conversation of the document starts with.
        joint: The conversation over all turns with chosen and with rejected answers, behind ``document_tokens``; None
            when the dataset was made with ``--turns independent``.
        independent: For each turn its own conversation [document; instruction; response] behind ``document_tokens``;
            empty when the source has only joint conversations.
        short: For each turn its short prompt; empty when the source has none.
    """

    id: str
    document_tokens: Tokens
    joint: BranchPair | None
    independent: tuple[BranchPair, ...]
    short: tuple[ShortPrompt, ...]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, TokenizedDocument)
            and np.array_equal(self.document_tokens, other.document_tokens)
            and (self.id, self.joint, self.independent, self.short)
            == (other.id, other.joint, other.independent, other.short)
        )

    @property
    def num_turns(self) -> int:
        """Turns of the document."""
        return len(self.independent) if self.joint is None else len(self.joint[CHOSEN].spans)

    @property
    def longest_sequence_tokens(self) -> int:
        """Tokens of the longest long conversation: the highest position id of its rows plus one."""
        branches = [branch for pair in self._long_pairs() for branch in pair]
        return len(self.document_tokens) + max(len(branch.tokens) for branch in branches)

    @property
    def longest_short_tokens(self) -> int:
        """Tokens of the longest short prompt with one of its responses; 0 without short prompts."""
        responses = [(short, branch) for short in self.short for branch in (short.chosen, short.rejected)]
        return max((len(short.prefix_tokens) + len(branch.tokens) for short, branch in responses), default=0)

    def all_tokens(self) -> Iterator[Tokens]:
        """Every token array of the document, each once."""
        yield self.document_tokens
        for chosen, rejected in self._long_pairs():
            yield chosen.tokens
            yield rejected.tokens
        for short in self.short:
            yield short.prefix_tokens
            yield short.chosen.tokens
            yield short.rejected.tokens

    def _long_pairs(self) -> tuple[BranchPair, ...]:
        return self.independent if self.joint is None else (self.joint, *self.independent)


def common_prefix_length(*sequences: Tokens) -> int:
    """Number of leading tokens that all sequences share."""
    length = min(len(sequence) for sequence in sequences)
    first = sequences[0][:length]
    for other in sequences[1:]:
        differs = np.flatnonzero(first[:length] != other[:length])
        if len(differs):
            length = int(differs[0])
    return length
