"""The ring's plans, as pure integers: every pair of the row's plan once, each with keys that the step holds."""

from __future__ import annotations

import pytest
import torch

from megatron_longpo.attention.dense import dense_mask
from megatron_longpo.attention.ring_tiles import ring_plans
from megatron_longpo.data.layout import DocumentLayout, RowLayout

ROWS = [
    pytest.param((DocumentLayout(61, (9, 14)),), 1, id="two branches"),
    pytest.param((DocumentLayout(1, (1, 2)),), 1, id="mostly padding"),
    pytest.param((DocumentLayout(33, (5, 3, 8)), DocumentLayout(17, (4,)), DocumentLayout(6, ())), 32, id="documents"),
]


@pytest.mark.parametrize(("documents", "row_multiple"), ROWS)
@pytest.mark.parametrize("cp_size", [2, 4, 8])
def test_steps_cover_every_pair_once(documents: tuple[DocumentLayout, ...], row_multiple: int, cp_size: int) -> None:
    layout = RowLayout(documents, cp_size, row_multiple)
    counts = torch.zeros(layout.padded_tokens, layout.padded_tokens, dtype=torch.int64)
    for rank in range(cp_size):
        queries = layout.local_index(rank)
        stored = torch.zeros(layout.local_tokens, dtype=torch.bool)
        for step, plan in enumerate(ring_plans(layout, rank)):
            keys = layout.local_index((rank - step) % cp_size)
            seen = torch.zeros(layout.local_tokens, dtype=torch.bool)
            for tile in plan.tiles:
                mask = torch.ones(tile.query_stop - tile.query_start, tile.key_stop - tile.key_start, dtype=torch.int64)
                counts[queries[tile.queries, None], keys[None, tile.keys]] += mask.tril() if tile.causal else mask
                assert stored[tile.queries].any().item() == (not tile.queries_first)
                assert stored[tile.queries].all().item() == (not tile.queries_first), (
                    "a result would merge with nothing"
                )
                assert seen[tile.keys].any().item() == (not tile.keys_first)
                stored[tile.queries] = seen[tile.keys] = True
            for start, stop in plan.unstored_queries:
                assert step == 0
                stored[start:stop] = True
            for start, stop in plan.unstored_keys:
                seen[start:stop] = True
            assert seen.all()
        assert stored.all()
    assert torch.equal(counts, dense_mask(layout).long())


def test_two_chunks_of_a_rank_are_one_rectangle() -> None:
    layout = RowLayout((DocumentLayout(64, (8, 8)),), cp_size=4)
    for step, plan in enumerate(ring_plans(layout, 1)):
        on_prefix = [tile for tile in plan.tiles if tile.of_branch and tile.key_start < 16 and not tile.causal]
        assert [(tile.key_start, tile.key_stop) for tile in on_prefix] == [(0, 16)], step
