"""From training rows to what one context-parallel rank computes: its shard of the tokens and its predictions.

Legend: T_local=tokens of this rank, K=predictions of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_longpo.data.layout import RowLayout
from megatron_longpo.data.predictions import ObjectiveSettings, Predictions, ReferenceLookup, predictions_of
from megatron_longpo.data.rows import TrainingRow, too_long
from megatron_longpo.data.sending import sent


@dataclass(frozen=True)
class Batch:
    """One micro-batch as one context-parallel rank sees it: one long row of documents.

    Args:
        tokens: int64 ``[T_local]``; 0 on padding.
        position_ids: int64 ``[T_local]``.
        layout: Where everything lies; the same on every rank.
        predictions: What this rank predicts.
        response_offset: int64 ``[K]``, the target's place in its response, or -1; with the response slot it says where
            a per-token log-prob belongs, whichever rank computed it.
        sample_ids: The documents' ids, in row order.
        numbers: Their numbers in the dataset.
        num_tokens: True tokens of the whole row, over all ranks.
    """

    tokens: torch.Tensor
    position_ids: torch.Tensor
    layout: RowLayout
    predictions: Predictions
    response_offset: torch.Tensor
    sample_ids: tuple[str, ...]
    numbers: tuple[int, ...]
    num_tokens: int

    def to(self, device: torch.device | str) -> Batch:
        """The same with every tensor on another device."""
        return replace(
            self,
            tokens=sent(self.tokens, device),
            position_ids=sent(self.position_ids, device),
            predictions=self.predictions.to(device),
            response_offset=sent(self.response_offset, device),
        )


def collate(
    rows: Sequence[TrainingRow],
    *,
    objective: ObjectiveSettings | None,
    cp_size: int = 1,
    cp_rank: int = 0,
    row_multiple: int = 1,
    max_sequence_tokens: int | None = None,
    reference: ReferenceLookup | None = None,
) -> Batch:
    """Concatenate rows into one batch and take one rank's part of it.

    Args:
        rows: The micro-batch.
        objective: Decides which tokens are predicted; None is the reference pass, which predicts exactly the response
            tokens of every branch.
        cp_size: Context-parallel size.
        cp_rank: Whose part.
        row_multiple: The padded row is a multiple of this (``cp * tp`` with sequence parallel).
        max_sequence_tokens: ``--seq-length``, the limit of a single conversation: prefix and one branch.
        reference: Where reference log-probs come from; the objectives that have a reference need it.

    Raises:
        ValueError: A conversation is longer than ``max_sequence_tokens``; reference log-probs are missing or are those
            of another document.
    """
    for row in rows:
        if max_sequence_tokens is not None and row.longest_sequence_tokens > max_sequence_tokens:
            raise too_long(row.id, row.longest_sequence_tokens, max_sequence_tokens)
    layout = RowLayout(tuple(row.layout for row in rows), cp_size, row_multiple)
    tokens = np.zeros(layout.padded_tokens, dtype=np.int64)
    for document, row in enumerate(rows):
        pieces = (row.prefix, *(branch.tokens for branch in row.branches))
        for segment, piece in zip(layout.of_document(document), pieces, strict=True):
            tokens[segment.start : segment.stop] = piece
    predictions, response_offset = predictions_of(rows, layout, cp_rank, objective, reference)
    local = layout.local_index(cp_rank)
    return Batch(
        tokens=torch.from_numpy(tokens)[local],
        position_ids=layout.position_ids()[local],
        layout=layout,
        predictions=predictions,
        response_offset=response_offset,
        sample_ids=tuple(row.id for row in rows),
        numbers=tuple(row.number for row in rows),
        num_tokens=layout.num_tokens,
    )
