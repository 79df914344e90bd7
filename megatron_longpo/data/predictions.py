"""Which next-token predictions a row asks for, and which of them one context-parallel rank makes.

The prediction of a token is made from the token before it, which for the first token of EVERY branch is the last token
of the prefix. It belongs to the rank that holds the predicting token, and only the tokens that the objective needs are
predicted at all.

Legend: T_local=tokens of a rank, K=predictions of a rank, D=documents of the micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_longpo.data.document import CHOSEN, REJECTED, ROLE_NAMES, Tokens
from megatron_longpo.data.layout import RowLayout, Segment
from megatron_longpo.data.rows import RowBranch, TrainingRow
from megatron_longpo.data.sending import sent

NO_RESPONSE = -1
"""Response slot and offset of a prediction whose target is not a response token."""

ReferenceTurns = Sequence[tuple[NDArray[np.float32], NDArray[np.float32]]]
"""For each turn of a document: the reference log-probs of its chosen and of its rejected response tokens."""


class ReferenceLookup(Protocol):
    """Where reference log-probs come from."""

    def of(self, number: int) -> ReferenceTurns:
        """The reference log-probs of one document, by its number in the dataset."""


class ObjectiveSettings(Protocol):
    """The part of `megatron_longpo.config.ObjectiveConfig` that decides what is predicted."""

    @property
    def objective(self) -> str:
        """``longpo``, ``dpo``, ``sft-chosen``, ``sft-rejected`` or ``sft-chosen-constraint``."""

    @property
    def nll_weight(self) -> float:
        """Factor on the negative log-likelihood; 0 leaves its predictions out."""


@dataclass(frozen=True)
class Predictions:
    """The next-token predictions that one context-parallel rank makes, flat over the documents of its micro-batch.

    Args:
        source_index: int64 ``[K]``, index into the local row ``[T_local]`` of the token that predicts, ascending. It
            repeats: the last prefix token predicts the first token of every branch.
        targets: int64 ``[K]``, the token ids predicted.
        nll_weight: fp32 ``[K]``. Σ weight·logp over a document's predictions on all ranks is the mean log-prob of its
            NLL sequence, over all of its next-token predictions, those of the document's own tokens included (Eq. 14).
        document_index: int64 ``[K]``, 0..D-1.
        response_slot: int64 ``[K]``, ``(document * max_turns + turn) * 2 + role`` with role 0 chosen and 1 rejected,
            or -1 where the target is not a response token.
        reference_logps: fp32 ``[K]``, log π_S of the target; 0 where it is not a response token.
        num_documents: D.
        max_turns: The largest number of turns of a document in the micro-batch.
        turn_mask: bool ``[D, max_turns]``, which turns exist.
    """

    source_index: torch.Tensor
    targets: torch.Tensor
    nll_weight: torch.Tensor
    document_index: torch.Tensor
    response_slot: torch.Tensor
    reference_logps: torch.Tensor
    num_documents: int
    max_turns: int
    turn_mask: torch.Tensor

    def to(self, device: torch.device | str) -> Predictions:
        """The same with every tensor on another device."""
        tensors: dict[str, Any] = {
            field.name: sent(value, device)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return replace(self, **tensors)


@dataclass
class _Piece:
    """Predictions from one segment, in row order. Arrays of one length; a scalar holds for all of them."""

    source: NDArray[np.int64]  # row index
    target: Tokens
    weight: float
    document: int
    slot: NDArray[np.int64] | int
    offset: NDArray[np.int64] | int
    reference: NDArray[np.float32] | float


def predictions_of(
    rows: Sequence[TrainingRow],
    layout: RowLayout,
    cp_rank: int,
    objective: ObjectiveSettings | None,
    reference: ReferenceLookup | None,
) -> tuple[Predictions, torch.Tensor]:
    """The predictions that one rank makes for a micro-batch.

    Args:
        rows: The micro-batch, in row order.
        layout: The layout of these rows.
        cp_rank: Whose predictions.
        objective: Decides what is predicted; None predicts exactly the response tokens of every branch.
        reference: Where reference log-probs come from.

    Returns:
        The predictions and, int64 ``[K]``, every target's place in its response (-1 outside of responses).
    """
    max_turns = max(row.num_turns for row in rows)
    pieces: list[_Piece] = []
    for document, row in enumerate(rows):
        prefix, *branches = layout.of_document(document)
        pieces += _document_pieces(document, row, prefix, branches, max_turns, objective, reference)

    def column(name: str, dtype: Any) -> NDArray[Any]:
        parts = [np.broadcast_to(getattr(piece, name), piece.source.shape).astype(dtype) for piece in pieces]
        return np.concatenate(parts) if parts else np.zeros(0, dtype)

    local = layout.local_index(cp_rank).numpy()
    place = np.full(layout.padded_tokens, -1, dtype=np.int64)
    place[local] = np.arange(len(local))
    source = place[column("source", np.int64)]
    # Ascending, so that the LM head reads its hidden states front to back; the sources of other ranks (-1) come first.
    order = np.argsort(source, kind="stable")[np.count_nonzero(source < 0) :]

    def tensor(name: str, dtype: Any) -> torch.Tensor:
        return torch.from_numpy(column(name, dtype)[order])

    num_turns = torch.tensor([row.num_turns for row in rows])
    predictions = Predictions(
        source_index=torch.from_numpy(source[order]),
        targets=tensor("target", np.int64),
        nll_weight=tensor("weight", np.float32),
        document_index=tensor("document", np.int64),
        response_slot=tensor("slot", np.int64),
        reference_logps=tensor("reference", np.float32),
        num_documents=len(rows),
        max_turns=max_turns,
        turn_mask=torch.arange(max_turns) < num_turns[:, None],
    )
    return predictions, tensor("offset", np.int64)


def _document_pieces(
    document: int,
    row: TrainingRow,
    prefix: Segment,
    branches: Sequence[Segment],
    max_turns: int,
    objective: ObjectiveSettings | None,
    reference: ReferenceLookup | None,
) -> list[_Piece]:
    pieces: list[_Piece] = []
    nll_role = _nll_role(objective)
    num_nll_branches = sum(branch.role == nll_role for branch in row.branches)

    def nll_weight(branch: RowBranch) -> float:
        """Share of one prediction in the mean over the row's NLL sequences of each sequence's own mean."""
        return 1.0 / (num_nll_branches * (len(row.prefix) + len(branch.tokens) - 1))

    if num_nll_branches:
        source = np.arange(prefix.start, prefix.stop - 1)
        weight = sum(nll_weight(branch) for branch in row.branches if branch.role == nll_role)
        pieces.append(_Piece(source, row.prefix[1:], weight, document, NO_RESPONSE, NO_RESPONSE, 0.0))

    turns = _reference_turns(row, objective, reference)
    token_by_token = objective is not None and objective.objective == "sft-chosen-constraint"
    for segment, branch in zip(branches, row.branches, strict=True):
        source = np.arange(segment.start - 1, segment.stop - 1)
        source[0] = prefix.stop - 1
        slot = np.full(len(source), NO_RESPONSE, dtype=np.int64)
        offset = np.full(len(source), NO_RESPONSE, dtype=np.int64)
        logps = np.zeros(len(source), dtype=np.float32)
        for turn, start, end in branch.spans:
            slot[start:end] = (document * max_turns + turn) * 2 + branch.role
            offset[start:end] = np.arange(end - start)
            if turns is not None:
                logps[start:end] = _fitted(row, branch, turn, turns[turn][branch.role], end - start, token_by_token)
        is_nll = branch.role == nll_role
        kept = slice(None) if is_nll else slot != NO_RESPONSE
        weight = nll_weight(branch) if is_nll else 0.0
        pieces.append(
            _Piece(source[kept], branch.tokens[kept], weight, document, slot[kept], offset[kept], logps[kept])
        )
    return pieces


def _nll_role(objective: ObjectiveSettings | None) -> int | None:
    """The role whose whole sequence is predicted, if any."""
    if objective is None:
        return None
    if objective.objective == "sft-rejected":
        return REJECTED
    # Without the NLL term the document's tokens need no logits, and they are nearly all of the LM head's work.
    return CHOSEN if objective.objective == "sft-chosen" or objective.nll_weight != 0 else None


def _reference_turns(
    row: TrainingRow, objective: ObjectiveSettings | None, reference: ReferenceLookup | None
) -> ReferenceTurns | None:
    if objective is None or objective.objective in ("sft-chosen", "sft-rejected"):
        return None
    if reference is None:
        raise ValueError(
            f"--objective {objective.objective} needs reference log-probs and none are given for document {row.id!r}: "
            f"run tools/compute_reference_logprobs.py"
        )
    turns = reference.of(row.number)
    if len(turns) != row.num_turns:
        raise ValueError(
            f"document {row.id!r} has {row.num_turns} turns and its reference log-probs have {len(turns)}: they are of "
            f"another dataset; run tools/compute_reference_logprobs.py again"
        )
    return turns


def _fitted(
    row: TrainingRow, branch: RowBranch, turn: int, logps: NDArray[np.float32], num_tokens: int, token_by_token: bool
) -> NDArray[np.float32]:
    """Reference log-probs laid on a response's tokens.

    A response can end in other tokens behind the short prompt than behind the long one (sources that come tokenized
    do that). Eq. 11 has only the sum of its log-probs, so the sum is kept: what does not fit goes on the last token.
    The constraint objective compares token by token, where that would be wrong.
    """
    if len(logps) == num_tokens:
        return logps
    if token_by_token:
        raise ValueError(
            f"document {row.id!r} turn {turn}: its {ROLE_NAMES[branch.role]} response has {num_tokens} tokens behind "
            f"the long prompt and {len(logps)} behind the short one, so --objective sft-chosen-constraint cannot "
            f"compare them token by token; use another objective or leave the document out"
        )
    fitted = np.zeros(num_tokens, dtype=np.float32)
    kept = min(num_tokens, len(logps))
    fitted[:kept] = logps[:kept]
    fitted[kept - 1] += logps[kept:].sum()
    return fitted
