"""From a tokenized document to the row that is trained on: a prefix and the branches that share it.

Token accounting of a joint row: with P the longest common token prefix of the chosen and the rejected conversation,
capped at the first response token, ``[P | C | R]`` holds every token of both conversations, those of P once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_longpo.data.document import (
    CHOSEN,
    REJECTED,
    ROLE_NAMES,
    TURNS,
    Branch,
    ShortPrompt,
    TokenizedDocument,
    Tokens,
    common_prefix_length,
)
from megatron_longpo.data.layout import DocumentLayout

OBJECTIVE_ROLES = {
    "longpo": (CHOSEN, REJECTED),
    "dpo": (CHOSEN, REJECTED),
    "sft-chosen": (CHOSEN,),
    "sft-rejected": (REJECTED,),
    "sft-chosen-constraint": (CHOSEN,),
}
"""The branches that each ``--objective`` computes."""


@dataclass(frozen=True, eq=False)
class RowBranch:
    """One branch of a row: its role, its tokens int32 ``[R]`` and its response spans ``(turn, start, end)``."""

    role: int
    tokens: Tokens
    spans: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, eq=False)
class TrainingRow:
    """One document (or one short prompt) as it enters a model: a prefix int32 ``[P]`` and the branches behind it.

    Args:
        id: The document's id, for messages.
        number: The document's number in its dataset: the key of its reference log-probs.
        prefix: int32 ``[P]``.
        branches: Joint turns: one per role. Independent turns: one per turn and role, turn by turn.
        num_turns: Turns of the document; a short row holds one of them and still counts all.
    """

    id: str
    number: int
    prefix: Tokens
    branches: tuple[RowBranch, ...]
    num_turns: int

    @property
    def layout(self) -> DocumentLayout:
        """The row's lengths, padding excluded."""
        return DocumentLayout(len(self.prefix), tuple(len(branch.tokens) for branch in self.branches))

    @property
    def num_tokens(self) -> int:
        """Tokens that the model computes for this row."""
        return self.layout.num_tokens

    @property
    def longest_sequence_tokens(self) -> int:
        """Tokens of the longest conversation in the row: its highest position id plus one."""
        return len(self.prefix) + max(len(branch.tokens) for branch in self.branches)


def training_row(
    document: TokenizedDocument, turns: str, roles: Sequence[int] = (CHOSEN, REJECTED), number: int = 0
) -> TrainingRow:
    """The row that trains on one document's long conversations.

    Args:
        document: What to train on.
        turns: ``joint`` (one conversation over all turns per role) or ``independent`` (every turn is its own pair of
            branches off the document).
        roles: Which of `CHOSEN` and `REJECTED`; `OBJECTIVE_ROLES` has them for every objective.
        number: The document's number in its dataset.

    Raises:
        ValueError: The dataset does not hold this kind of conversation.
    """
    if turns == "joint":
        if document.joint is None:
            raise ValueError(
                f"document {document.id!r} has no joint conversation: its dataset was written with --turns "
                f"independent. Train with --turns independent, or run tools/preprocess_pairs.py again without it"
            )
        pairs: tuple[tuple[Branch, Branch], ...] = (document.joint,)
    elif turns == "independent":
        if not document.independent:
            raise ValueError(
                f"document {document.id!r} has only a joint conversation (its source was already tokenized): train "
                f"with --turns joint"
            )
        pairs = document.independent
    else:
        raise ValueError(f"--turns {turns} is unknown: choose one of {', '.join(TURNS)}")
    branches = [(role, pair[role]) for pair in pairs for role in roles]
    return _row(document.id, number, document.document_tokens, branches, document.num_turns)


def short_rows(
    document: TokenizedDocument, roles: Sequence[int] = (CHOSEN, REJECTED), number: int = 0
) -> list[TrainingRow]:
    """The rows of the reference pass: one per turn, the turn's short prompt with its branches.

    Raises:
        ValueError: The document's source has no short prompts.
    """
    if not document.short:
        raise ValueError(
            f"document {document.id!r} has no short prompts, which the reference of LongPO needs: add 'chunk' or "
            f"'chunk_span' (TRL rows: 'short_prompt') to the pairs file, or train with --objective dpo, sft-chosen or "
            f"sft-rejected"
        )
    return [_short_row(document, short, roles, number) for short in document.short]


def too_long(id: str, num_tokens: int, limit: int) -> ValueError:
    """The error that a document's conversation is longer than ``--seq-length``."""
    return ValueError(
        f"document {id!r} has a conversation of {num_tokens} tokens, above --seq-length {limit}: raise --seq-length, "
        f"or run tools/preprocess_pairs.py again with --max-seq-length {limit} (and --truncate-document to cut instead "
        f"of drop)"
    )


def _short_row(document: TokenizedDocument, short: ShortPrompt, roles: Sequence[int], number: int) -> TrainingRow:
    pair = (short.chosen, short.rejected)
    branches = [(role, pair[role]) for role in roles]
    return _row(document.id, number, short.prefix_tokens, branches, document.num_turns)


def _row(id: str, number: int, prefix: Tokens, branches: Sequence[tuple[int, Branch]], num_turns: int) -> TrainingRow:
    """Move what all branches still share into the prefix, response tokens never."""
    first_response = min(branch.spans[0][1] for _, branch in branches)
    shared = min(first_response, common_prefix_length(*(branch.tokens for _, branch in branches)))
    if len(prefix) + shared == 0:
        roles = ", ".join(ROLE_NAMES[role] for role, _ in branches)
        raise ValueError(
            f"document {id!r}: its conversations ({roles}) share no first token, so nothing predicts their first "
            f"token; use a chat template that renders something before the answer"
        )
    moved = branches[0][1].tokens[:shared]
    return TrainingRow(
        id,
        number,
        np.concatenate([prefix, moved]) if shared else prefix,
        tuple(RowBranch(role, branch.tokens[shared:], _shifted(branch.spans, shared)) for role, branch in branches),
        num_turns,
    )


def _shifted(spans: Sequence[tuple[int, int, int]], by: int) -> tuple[tuple[int, int, int], ...]:
    return tuple((turn, start - by, end - by) for turn, start, end in spans)
