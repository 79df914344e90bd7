"""What a pairs file holds, whichever its format: documents with turns, or conversations that are already tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Location:
    """Where a row stands: a file and its line (JSON lines), item (JSON lists) or row (tables), counted from 1."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class PairsError(ValueError):
    """A row that cannot be used; the message names file, line, field and the fix."""

    def __init__(self, where: Location | str, field_name: str, problem: str, fix: str) -> None:
        super().__init__(
            f"{where}: field '{field_name}' {problem}; {fix}" if field_name else f"{where}: {problem}; {fix}"
        )


@dataclass(frozen=True)
class Message:
    """One message of a chat."""

    role: str
    content: str


@dataclass(frozen=True)
class Turn:
    """One instruction with its two answers.

    Args:
        instruction: I; empty where the document text already ends with it (TRL rows).
        chosen: The answer from the short prompt.
        rejected: The answer from the long prompt.
        chunk: C_S; None where the source has no short prompt.
        chunk_span: Where the chunk lies in the document, in characters, if that is known.
        provenance: What made this turn; carried along, never interpreted.
    """

    instruction: str
    chosen: str
    rejected: str
    chunk: str | None
    chunk_span: tuple[int, int] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PreferenceDocument:
    """One long document with its turns.

    Args:
        id: Unique in the dataset.
        document: C_L.
        turns: One or more, in the order asked.
        provenance: What made the pairs; carried along, never interpreted.
        long_context: Messages before the long prompt (a system message of a TRL row).
        short_context: Messages before the short prompt.
        location: Where it was read.
    """

    id: str
    document: str
    turns: tuple[Turn, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    long_context: tuple[Message, ...] = ()
    short_context: tuple[Message, ...] = ()
    location: Location | None = field(default=None, compare=False)


@dataclass(frozen=True, eq=False)
class TokenSequence:
    """A tokenized conversation: int32 ``[T]`` and which of its tokens are responses, bool ``[T]``."""

    tokens: NDArray[np.int32]
    is_response: NDArray[np.bool_]

    def responses(self) -> list[tuple[int, int]]:
        """The runs of response tokens as (start, end)."""
        padded = np.concatenate([[False], self.is_response, [False]]).astype(np.int8)
        starts, ends = (np.flatnonzero(np.diff(padded) == step).tolist() for step in (1, -1))
        return list(zip(starts, ends, strict=True))


@dataclass(frozen=True, eq=False)
class TokenizedPair:
    """One row of the LongPO authors' released sets: tokens made with their own template.

    Args:
        chosen: The joint conversation over all turns with chosen answers.
        rejected: The same with rejected answers.
        short_chosen: For each turn its short prompt and chosen answer; empty where the row has none.
        short_rejected: For each turn its short prompt and rejected answer.
    """

    id: str
    chosen: TokenSequence
    rejected: TokenSequence
    short_chosen: tuple[TokenSequence, ...]
    short_rejected: tuple[TokenSequence, ...]
    location: Location | None = None


PairsRow = PreferenceDocument | TokenizedPair
