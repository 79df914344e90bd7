"""What a ring sends and computes: counted for all ranks at once, and by their plans."""

from __future__ import annotations

import pytest

from megatron_longpo.attention.ring_tiles import ring_plan
from megatron_longpo.attention.tiles import Tile
from megatron_longpo.data.layout import DocumentLayout, RowLayout
from megatron_longpo.model.flops import attended_pairs
from megatron_longpo.planning.ring_work import hop_tokens, step_pairs

Documents = tuple[tuple[int, tuple[int, ...]], ...]
"""Prefix and branches of each."""


@pytest.mark.parametrize("window_tokens", [1, 30, 64, 300, 1100, 2000])
@pytest.mark.parametrize("documents", [((1000, (90, 40)),), ((700, (33, 50)), (90, (200,)), (1, ()))])
def test_the_work_of_a_ring_is_that_of_its_tiles(documents: Documents, window_tokens: int) -> None:
    of_six = RowLayout(tuple(DocumentLayout(*document) for document in documents), 6, 16, window_tokens)
    for layout in (of_six, of_six.over(3), of_six.over(2)):
        plans = [ring_plan(layout, rank) for rank in range(layout.cp_size)]
        assert hop_tokens(layout) == max(plan.num_sent for plan in plans)
        steps = zip(*(plan.steps for plan in plans), strict=True)
        of_tiles = [sum(num_pairs(tile) for plan in step for tile in plan.tiles) for step in steps]
        assert step_pairs(layout, window_tokens) == of_tiles and sum(of_tiles) == attended_pairs(layout)


def num_pairs(tile: Tile) -> int:
    """Query-key pairs that a tile computes."""
    queries, keys = (stop - start for start, stop in (tile.query_span, tile.key_span))
    return queries * (queries + 1) // 2 if tile.causal else queries * keys
