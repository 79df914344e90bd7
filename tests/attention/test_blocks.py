"""Plans whose tiles are cut to whole blocks: the same mask, few shapes."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_longpo.attention.blocks import are_blocks, in_blocks
from megatron_longpo.attention.cudnn import CudnnKernel
from megatron_longpo.attention.dense import dense_mask
from megatron_longpo.attention.ring_tiles import ring_plan
from megatron_longpo.attention.tiles import Plan, plan
from megatron_longpo.data.layout import DocumentLayout, RowLayout
from tests.attention.test_ring_tiles import check_steps
from tests.attention.test_tiles import check_first_tiles, layouts, times_covered

cuts = st.tuples(st.integers(1, 9), st.integers(1, 12))


@settings(max_examples=150, deadline=None)
@given(layouts, cuts)
def test_the_mask_stays_and_so_does_who_stores_first(layout: RowLayout, cut: tuple[int, int]) -> None:
    size, mask = layout.padded_tokens, dense_mask(layout).long()
    whole = in_blocks(plan(layout), *cut)
    assert torch.equal(times_covered(whole, size, size), mask)
    check_first_tiles(whole, size, size)
    for rank in range(layout.cp_size):
        of_rank = in_blocks(plan(layout, rank), *cut)
        covered = times_covered(of_rank, layout.local_tokens, size)
        assert torch.equal(covered, mask[layout.local_index(rank)])
        check_first_tiles(of_rank, layout.local_tokens, size)


@settings(max_examples=60, deadline=None)
@given(layouts.filter(lambda layout: layout.cp_size > 1), cuts)
def test_a_ring_s_steps_stay_too(layout: RowLayout, cut: tuple[int, int]) -> None:
    check_steps(layout, lambda tiles: in_blocks(tiles, *cut))


@settings(max_examples=100, deadline=None)
@given(layouts, cuts)
def test_a_large_part_is_in_whole_blocks(layout: RowLayout, cut: tuple[int, int]) -> None:
    block, smallest = cut
    for tile in in_blocks(plan(layout), *cut).tiles:
        sides = [stop - start for start, stop in (tile.query_span, tile.key_span)]
        rest = [side for side in sides if side - side % block < smallest]
        assert are_blocks(*sides, *cut) or rest or (tile.causal is False and min(sides) < block), (tile, cut)


def test_the_cut_plan_is_made_once() -> None:
    tiles = plan(RowLayout((DocumentLayout(20, (3, 4)),)))
    assert in_blocks(tiles, 4, 8) is in_blocks(tiles, 4, 8)
    assert CudnnKernel().cut(tiles).tiles == tiles.tiles


@pytest.mark.parametrize(("cp_size", "ring", "most"), [(1, False, 600), (8, False, 300), (8, True, 100)])
def test_thousands_of_lengths_have_few_shapes(cp_size: int, ring: bool, most: int) -> None:
    """The shapes that cuDNN sees of 600 documents; uncut there are thousands."""
    generator = random.Random(0)
    kernel, shapes, uncut = CudnnKernel(), set(), set()
    for _ in range(600):
        branches = generator.randint(50, 600), generator.randint(50, 600)
        layout = RowLayout((DocumentLayout(generator.randint(60_000, 130_000), branches),), cp_size, 2 * cp_size)
        for tiles in plans_of_rank_0(layout, ring):
            uncut |= set(sides(tiles))
            shapes |= {shape for shape in sides(kernel.cut(tiles)) if are_blocks(*shape[:2], *kernel.blocks)}
    assert len(shapes) < most < 1500 < len(uncut)


def plans_of_rank_0(layout: RowLayout, ring: bool) -> Iterator[Plan]:
    if ring:
        yield from ring_plan(layout, 0).steps
    else:
        yield plan(layout, 0 if layout.cp_size > 1 else None)


def sides(tiles: Plan) -> Iterator[tuple[int, int, bool]]:
    for tile in tiles.tiles:
        (start, stop), (key_start, key_stop) = tile.query_span, tile.key_span
        yield stop - start, key_stop - key_start, tile.causal
