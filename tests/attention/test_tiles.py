"""The tiles of a plan are the mask: every allowed pair once, no other pair, no padding."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_longpo.attention.dense import dense_mask
from megatron_longpo.attention.tiles import Plan, plan
from megatron_longpo.data.layout import DocumentLayout, RowLayout

documents = st.builds(
    DocumentLayout,
    st.integers(1, 40),
    st.lists(st.integers(1, 12), max_size=4).map(tuple),
)
layouts = st.builds(
    RowLayout,
    st.lists(documents, min_size=1, max_size=3).map(tuple),
    cp_size=st.sampled_from([1, 2, 3, 4]),
    row_multiple=st.sampled_from([1, 8, 24]),
)


def times_covered(tiles: Plan, num_queries: int, num_keys: int) -> torch.Tensor:
    """How many tiles hold each (query, key) pair: int64 ``[num_queries, num_keys]``."""
    count = torch.zeros(num_queries, num_keys, dtype=torch.int64)
    for tile in tiles.tiles:
        part = torch.ones(tile.query_stop - tile.query_start, tile.key_stop - tile.key_start, dtype=torch.int64)
        assert part.numel() > 0
        assert not tile.causal or part.shape[0] == part.shape[1]
        count[tile.queries, tile.keys] += part.tril() if tile.causal else part
    return count


@settings(max_examples=150, deadline=None)
@given(layouts)
def test_whole_row_is_the_mask(layout: RowLayout) -> None:
    size = layout.padded_tokens
    assert torch.equal(times_covered(plan(layout), size, size), dense_mask(layout).long())


@settings(max_examples=150, deadline=None)
@given(layouts)
def test_every_rank_has_its_rows_of_the_mask(layout: RowLayout) -> None:
    mask = dense_mask(layout).long()
    for rank in range(layout.cp_size):
        covered = times_covered(plan(layout, rank), layout.local_tokens, layout.padded_tokens)
        assert torch.equal(covered, mask[layout.local_index(rank)])


@settings(max_examples=100, deadline=None)
@given(layouts)
def test_first_tiles_store_and_the_rest_finds_what_to_add_to(layout: RowLayout) -> None:
    for rank in (None, *range(layout.cp_size)):
        num_queries = layout.padded_tokens if rank is None else layout.local_tokens
        tiles = plan(layout, rank)
        queries = torch.zeros(num_queries, dtype=torch.bool)
        keys = torch.zeros(layout.padded_tokens, dtype=torch.bool)
        for start, stop in tiles.unstored_queries:
            queries[start:stop] = True
        for start, stop in tiles.unstored_keys:
            keys[start:stop] = True
        padding = torch.ones(num_queries, dtype=torch.bool)
        for tile in tiles.tiles:
            for initialised, rows, first in (
                (queries, tile.queries, tile.queries_first),
                (keys, tile.keys, tile.keys_first),
            ):
                # Storing over what is there would lose it; adding to what was never set would add garbage.
                assert not initialised[rows].any() if first else initialised[rows].all()
                initialised[rows] = True
            padding[tile.queries] = False
        assert queries.all() and keys.all()
        stored = torch.zeros_like(padding)
        for start, stop in tiles.unstored_queries:
            stored[start:stop] = True
        assert torch.equal(padding, stored), "a query with tiles must start from its first tile, not from zero"


def test_branches_share_one_rectangle_on_the_prefix() -> None:
    tiles = plan(RowLayout((DocumentLayout(100, (5, 7, 9)),))).tiles
    assert [(t.queries, t.keys, t.causal) for t in tiles] == [
        (slice(100, 121), slice(0, 100), False),
        (slice(112, 121), slice(112, 121), True),
        (slice(105, 112), slice(105, 112), True),
        (slice(100, 105), slice(100, 105), True),
        (slice(0, 100), slice(0, 100), True),
    ]


def test_middle_chunks_of_the_last_rank_are_one_square() -> None:
    layout = RowLayout((DocumentLayout(80, ()),), cp_size=4)
    tiles = plan(layout, 3).tiles
    assert [(t.queries, t.keys, t.causal) for t in tiles] == [
        (slice(0, 20), slice(0, 30), False),
        (slice(0, 20), slice(30, 50), True),
    ]


def test_ranks_do_equal_work() -> None:
    layout = RowLayout((DocumentLayout(8192, (128, 128)),), cp_size=4)
    pairs = [times_covered(plan(layout, rank), layout.local_tokens, layout.padded_tokens).sum() for rank in range(4)]
    assert max(pairs) < 1.01 * min(pairs)


def test_plans_are_cached_by_value() -> None:
    def build() -> RowLayout:
        return RowLayout((DocumentLayout(9, (4, 5)),), cp_size=2)

    assert plan(build(), 1) is plan(build(), 1)
