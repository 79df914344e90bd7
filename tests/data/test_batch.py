"""Batches: each rank's tokens and positions, and the limit of a conversation's length."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_longpo.data.batch import collate
from megatron_longpo.data.rows import TrainingRow, training_row
from tests.data.samples import random_document, training_rows


@given(st.lists(training_rows(), min_size=1, max_size=3), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]))
def test_the_shards_together_are_the_rows(rows: list[TrainingRow], cp_size: int, tp_size: int) -> None:
    batches = [
        collate(rows, objective=None, cp_size=cp_size, cp_rank=rank, row_multiple=cp_size * tp_size)
        for rank in range(cp_size)
    ]
    layout = batches[0].layout
    assert all(batch.layout == layout and batch.num_tokens == layout.num_tokens for batch in batches)
    assert len(batches[0].tokens) * cp_size % (cp_size * tp_size) == 0
    tokens = torch.cat([batch.tokens for batch in batches])[layout.gathered_index()]
    positions = torch.cat([batch.position_ids for batch in batches])[layout.gathered_index()]
    assert torch.equal(positions, layout.position_ids())
    expected = [piece.tolist() for row in rows for piece in (row.prefix, *(branch.tokens for branch in row.branches))]
    for segment, piece in zip(layout.segments, expected, strict=True):
        assert tokens[segment.start : segment.stop].tolist() == piece
        assert not tokens[segment.stop : segment.start + segment.padded_tokens].any()


def test_a_batch_names_its_documents_and_moves_as_a_whole() -> None:
    rows = [training_row(random_document(seed), "joint", number=seed + 4) for seed in range(2)]
    batch = collate(rows, objective=None)
    assert batch.sample_ids == ("document-0", "document-1") and batch.numbers == (4, 5)
    moved = batch.to("meta")
    tensors = [moved.tokens, moved.position_ids, moved.response_offset, moved.predictions.targets]
    assert all(tensor.device.type == "meta" for tensor in [*tensors, moved.predictions.turn_mask])
    assert moved.layout is batch.layout and moved.predictions.max_turns == batch.predictions.max_turns


def test_a_conversation_above_seq_length_is_named_with_the_fix() -> None:
    row = training_row(random_document(0), "joint")
    collate([row], objective=None, max_sequence_tokens=row.longest_sequence_tokens)
    with pytest.raises(ValueError, match=r"'document-0'.*--seq-length.*--max-seq-length"):
        collate([row], objective=None, max_sequence_tokens=row.longest_sequence_tokens - 1)
