"""The ring's plans, as pure integers: every pair of the row's plan once, each with keys that the step holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_longpo.attention.dense import dense_mask
from megatron_longpo.attention.ring_tiles import ring_plan
from megatron_longpo.attention.tiles import Plan, held_runs
from megatron_longpo.data.layout import DocumentLayout, RowLayout
from tests.attention.test_tiles import times_covered

documents = st.builds(DocumentLayout, st.integers(1, 70), st.lists(st.integers(1, 14), max_size=4).map(tuple))
layouts = st.builds(
    RowLayout,
    st.lists(documents, min_size=1, max_size=3).map(tuple),
    cp_size=st.sampled_from([2, 3, 4, 8]),
    row_multiple=st.sampled_from([1, 32]),
    window_tokens=st.none() | st.integers(1, 90),
)


def sent_keys(layout: RowLayout, rank: int) -> torch.Tensor:
    """Row indices of the keys that a rank sends off, in order."""
    local = layout.local_index(rank)
    return torch.cat([local[start:stop] for start, stop in ring_plan(layout, rank).sent])


def check_steps(layout: RowLayout, cut: Callable[[Plan], Plan] = lambda plan: plan) -> None:
    """The steps of all ranks cover every pair of the mask once and no other; what they say of first tiles is true."""
    mask = dense_mask(layout).long()
    counts = torch.zeros_like(mask)
    for rank in range(layout.cp_size):
        queries = layout.local_index(rank)
        stored = torch.zeros(layout.local_tokens, dtype=torch.bool)
        steps, num_keys = ring_plan(layout, rank).steps, ring_plan(layout, rank).num_keys
        for step, plan in enumerate(map(cut, steps)):
            keys = queries if step == 0 else sent_keys(layout, (rank - step) % layout.cp_size)
            assert num_keys[step] == len(keys) > 0
            counts[queries[:, None], keys] += times_covered(plan, len(queries), len(keys))
            seen = torch.zeros(len(keys), dtype=torch.bool)
            for start, stop in plan.unstored_queries:
                assert step == 0 and not mask[queries[start:stop]].any(), "only padding starts from zero"
                stored[start:stop] = True
            for start, stop in plan.unstored_keys:
                seen[start:stop] = True
            for tile in plan.tiles:
                # Storing over what is there would lose it; merging or adding to what was never set takes garbage.
                for initialised, of, first in (
                    (stored, tile.queries, tile.queries_first),
                    (seen, tile.keys, tile.keys_first),
                ):
                    assert not initialised[of].any() if first else initialised[of].all()
                    initialised[of] = True
            assert seen.all()
            assert stored.all(), "own keys come first, so that every query has a result to merge with"
    assert torch.equal(counts, mask)


@settings(max_examples=200, deadline=None)
@given(layouts)
def test_steps_cover_every_pair_once(layout: RowLayout) -> None:
    check_steps(layout)


@settings(max_examples=60, deadline=None)
@given(layouts.filter(lambda layout: layout.window_tokens is not None))
def test_of_neighbouring_keys_those_between_two_that_another_rank_sees_are_sent(layout: RowLayout) -> None:
    mask = dense_mask(layout)
    for rank in range(layout.cp_size):
        of_others = torch.ones(layout.padded_tokens, dtype=torch.bool)
        of_others[layout.local_index(rank)] = False
        seen = mask[of_others].any(0)
        expected: list[int] = []
        for run in held_runs(layout, rank):
            keys = [key for key in range(run.row, run.row + run.length) if seen[key]]
            expected += range(keys[0], keys[-1] + 1) if keys else []
        # One key goes around where nobody sees any.
        assert sent_keys(layout, rank).tolist() == (expected or layout.local_index(rank)[:1].tolist())


@settings(max_examples=100, deadline=None)
@given(layouts, st.sampled_from([2, 4]))
def test_steps_between_groups_of_ranks(layout: RowLayout, ring_size: int) -> None:
    check_steps(replace(layout, cp_size=8).over(ring_size))


def test_a_flipped_square_is_cut_where_its_keys_change_hands() -> None:
    layout = RowLayout((DocumentLayout(32, ()),), cp_size=4, window_tokens=8)  # chunks of 4, a window of two
    parts = [
        [(t.query_span, t.key_span, t.causal, t.flipped) for t in plan.tiles] for plan in ring_plan(layout, 3).steps
    ]
    # Tokens 12 to 19 are one block: token 12 + i sees tokens 5 + i to 11, of chunks 1 and 2 on ranks 1 and 2.
    assert parts == [
        [((0, 8), (0, 8), True, False)],
        [((0, 3), (0, 4), False, False), ((3, 7), (0, 4), True, True)],
        [((0, 3), (1, 4), True, True)],
        [],
    ]


def test_a_window_sends_what_other_ranks_see() -> None:
    # Two chunks of 64 on every rank; the query at position p sees p - 9 to p.
    layout = RowLayout((DocumentLayout(512, ()),), cp_size=4, window_tokens=10)
    ends = [list(range(chunk * 64 + 55, chunk * 64 + 64)) for chunk in range(8)]
    assert [sent_keys(layout, rank).tolist() for rank in range(4)] == [
        ends[0],  # nobody comes after the last chunk
        ends[1] + ends[6],
        ends[2] + ends[5],
        ends[4],  # chunk 4 sees chunk 3 on its own rank
    ]
    assert ring_plan(layout, 2).num_keys == (128, 18, 9, 9)
    # Branches are short, and all ranks hold pieces of them; their first tokens see the end of the prefix.
    layout = RowLayout((DocumentLayout(512, (16, 16)),), cp_size=4, window_tokens=10)
    assert sent_keys(layout, 0).tolist() == [*ends[0], *range(505, 514), 528, 529]
    full = replace(layout, window_tokens=None)
    assert sent_keys(full, 0).tolist() == full.local_index(0).tolist()


def test_two_chunks_of_a_rank_are_one_rectangle() -> None:
    layout = RowLayout((DocumentLayout(64, (8, 8)),), cp_size=4)
    for step, plan in enumerate(ring_plan(layout, 1).steps):
        on_prefix = [tile for tile in plan.tiles if tile.of_branch and tile.key_span[0] < 16 and not tile.causal]
        assert [tile.key_span for tile in on_prefix] == [(0, 16)], step
