"""RowLayout: every token has exactly one place, padding is known, and the context-parallel split is even."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_longpo.data.layout import PREFIX, DocumentLayout, RowLayout

documents = st.builds(
    DocumentLayout,
    prefix_tokens=st.integers(1, 40),
    branch_tokens=st.lists(st.integers(1, 20), max_size=6).map(tuple),
)
layouts = st.builds(
    lambda documents, cp_size, tp_size: RowLayout(tuple(documents), cp_size, cp_size * tp_size),
    st.lists(documents, min_size=1, max_size=3),
    st.sampled_from([1, 2, 3, 4]),
    st.sampled_from([1, 2, 4]),
)


@given(layouts)
def test_segments_tile_the_row(layout: RowLayout) -> None:
    at = 0
    for segment in layout.segments:
        assert segment.start == at
        assert 0 < segment.num_tokens <= segment.padded_tokens
        at += segment.padded_tokens
    assert at == layout.padded_tokens
    assert layout.num_tokens == sum(segment.num_tokens for segment in layout.segments)


@given(layouts)
def test_padding_is_as_small_as_the_split_allows(layout: RowLayout) -> None:
    chunk = 2 * layout.cp_size if layout.cp_size > 1 else 1
    assert layout.padded_tokens % layout.row_multiple == 0
    for segment in layout.segments[1:]:
        assert segment.padded_tokens % chunk == 0
        assert segment.padded_tokens - segment.num_tokens < chunk
    first = layout.segments[0]
    assert first.padded_tokens % chunk == 0
    assert first.padded_tokens - first.num_tokens < chunk + layout.row_multiple * chunk


@given(layouts)
def test_ranks_share_the_row_evenly_and_completely(layout: RowLayout) -> None:
    shards = [layout.local_index(rank) for rank in range(layout.cp_size)]
    assert all(len(shard) == layout.local_tokens for shard in shards)
    assert torch.equal(torch.cat(shards).sort().values, torch.arange(layout.padded_tokens))
    row = torch.randn(layout.padded_tokens)
    gathered = torch.cat([row[shard] for shard in shards])
    assert torch.equal(gathered[layout.gathered_index()], row)


@given(layouts)
def test_a_rank_holds_a_chunk_and_its_mirror_image_of_every_segment(layout: RowLayout) -> None:
    if layout.cp_size == 1:
        return
    for rank in range(layout.cp_size):
        pieces = list(layout.chunks(rank))
        assert [piece[0] for piece in pieces[::2]] == list(layout.segments)
        for (segment, first, first_stop), (_, second, second_stop) in zip(pieces[::2], pieces[1::2], strict=True):
            assert first - segment.start == segment.start + segment.padded_tokens - second_stop
            assert first_stop - first == second_stop - second


@given(layouts)
def test_positions_are_those_of_separate_sequences(layout: RowLayout) -> None:
    positions = layout.position_ids()
    assert positions.dtype == torch.int64 and len(positions) == layout.padded_tokens
    for segment in layout.segments:
        start = 0 if segment.branch == PREFIX else layout.documents[segment.document].prefix_tokens
        expected = torch.arange(start, start + segment.num_tokens)
        assert torch.equal(positions[segment.start : segment.stop], expected)


@given(layouts)
def test_branches_know_their_own_documents_prefix(layout: RowLayout) -> None:
    for number, document in enumerate(layout.documents):
        prefix, *branches = layout.of_document(number)
        assert prefix.branch == PREFIX and prefix.num_tokens == document.prefix_tokens
        assert [branch.num_tokens for branch in branches] == list(document.branch_tokens)
        assert [branch.branch for branch in branches] == list(range(len(branches)))
        for segment in (prefix, *branches):
            assert (segment.prefix_start, segment.prefix_tokens) == (prefix.start, prefix.num_tokens)


@given(layouts)
def test_a_layout_survives_its_journey_as_a_tensor(layout: RowLayout) -> None:
    encoded = layout.to_tensor()
    assert encoded.dtype == torch.int64
    assert RowLayout.from_tensor(encoded) == layout
    assert RowLayout.from_tensor(encoded) is RowLayout.from_tensor(encoded.clone())


def test_layout_of_two_documents_by_hand() -> None:
    layout = RowLayout((DocumentLayout(5, (3, 2)), DocumentLayout(4, (1,))), cp_size=2)
    assert [(s.start, s.num_tokens, s.padded_tokens) for s in layout.segments] == [
        (0, 5, 8),
        (8, 3, 4),
        (12, 2, 4),
        (16, 4, 4),
        (20, 1, 4),
    ]
    assert layout.local_index(0).tolist() == [0, 1, 6, 7, 8, 11, 12, 15, 16, 19, 20, 23]
    assert layout.local_index(1).tolist() == [2, 3, 4, 5, 9, 10, 13, 14, 17, 18, 21, 22]
    assert layout.position_ids().tolist()[:16] == [0, 1, 2, 3, 4, 5, 6, 7, 5, 6, 7, 8, 5, 6, 7, 8]
    assert (layout.num_tokens, layout.padded_tokens, layout.local_tokens) == (15, 24, 12)
    assert RowLayout(layout.documents).padded_tokens == 15, "one rank needs no padding"


@pytest.mark.parametrize(("prefix", "branches"), [(0, (1, 1)), (3, (0,)), (-1, ())])
def test_empty_segments_are_refused(prefix: int, branches: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        DocumentLayout(prefix, branches)
