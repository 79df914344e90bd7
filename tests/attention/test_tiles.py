"""The tiles of a plan are the mask: every allowed pair once, no other pair, no padding."""

from dataclasses import replace

import pytest
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
    window_tokens=st.none() | st.integers(1, 60),
)


def times_covered(tiles: Plan, num_queries: int, num_keys: int) -> torch.Tensor:
    """How many tiles hold each (query, key) pair: int64 ``[num_queries, num_keys]``."""
    count = torch.zeros(num_queries, num_keys, dtype=torch.int64)
    for tile in tiles.tiles:
        part = torch.ones_like(count[tile.queries, tile.keys])
        assert part.numel() > 0
        assert not tile.causal or part.shape[0] == part.shape[1]
        if tile.causal:
            part = part.triu() if tile.flipped else part.tril()
        count[tile.queries, tile.keys] += part
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
        check_first_tiles(plan(layout, rank), num_queries, layout.padded_tokens)


def check_first_tiles(tiles: Plan, num_queries: int, num_keys: int) -> None:
    """What a plan says of first tiles and of what they leave out is true."""
    queries = torch.zeros(num_queries, dtype=torch.bool)
    keys = torch.zeros(num_keys, dtype=torch.bool)
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
    assert [t.of_branch for t in tiles] == [True, True, True, True, False]


def test_middle_chunks_of_the_last_rank_are_one_square() -> None:
    layout = RowLayout((DocumentLayout(80, ()),), cp_size=4)
    tiles = plan(layout, 3).tiles
    assert [(t.queries, t.keys, t.causal) for t in tiles] == [
        (slice(0, 20), slice(0, 30), False),
        (slice(0, 20), slice(30, 50), True),
    ]


@settings(max_examples=50, deadline=None)
@given(layouts, st.integers(0, 10))
def test_a_window_that_no_token_outlives_costs_nothing(layout: RowLayout, spare: int) -> None:
    longest = max(d.prefix_tokens + max(d.branch_tokens, default=0) for d in layout.documents)
    windowed, full = (replace(layout, window_tokens=tokens) for tokens in (longest + spare, None))
    for rank in (None, *range(layout.cp_size)):
        assert plan(windowed, rank).tiles == plan(full, rank).tiles


def test_a_window_cuts_blocks_of_its_length_and_what_they_still_see() -> None:
    tiles = plan(RowLayout((DocumentLayout(10, (3,)),), window_tokens=4)).tiles
    assert [(t.queries, t.keys, t.causal, t.flipped) for t in tiles] == [
        (slice(0, 4), slice(0, 4), True, False),
        (slice(4, 8), slice(4, 8), True, False),
        (slice(8, 10), slice(8, 10), True, False),
        (slice(10, 13), slice(10, 13), True, False),
        (slice(4, 7), slice(1, 4), True, True),
        (slice(8, 10), slice(6, 8), False, False),
        (slice(8, 9), slice(5, 6), True, True),
        (slice(10, 13), slice(9, 10), False, False),
        (slice(10, 12), slice(7, 9), True, True),
    ]
    assert [t.of_branch for t in tiles] == [t.queries.start >= 10 for t in tiles]


@pytest.mark.parametrize("window_tokens", [None, 500])
def test_ranks_do_equal_work(window_tokens: int | None) -> None:
    layout = RowLayout((DocumentLayout(8192, (128, 128)),), cp_size=4, window_tokens=window_tokens)
    pairs = [times_covered(plan(layout, rank), layout.local_tokens, layout.padded_tokens).sum() for rank in range(4)]
    # With a window, the first chunk has less to see.
    assert max(pairs) < (1.01 if window_tokens is None else 1.2) * min(pairs)


def test_plans_are_cached_by_value() -> None:
    def build() -> RowLayout:
        return RowLayout((DocumentLayout(9, (4, 5)),), cp_size=2)

    assert plan(build(), 1) is plan(build(), 1)
