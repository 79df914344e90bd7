"""The tiles of a context-parallel ring: those of `tiles.plan`, cut by the rank whose keys they need.

At every step of the ring a rank holds the keys of one rank, in that rank's local order, and computes the parts of its
tiles that have these keys. A rank's two chunks of a segment lie side by side in its local order, so a rectangle on both
of them stays one rectangle. Causal squares are on a rank's own keys: step 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache

from megatron_longpo.attention.tiles import Plan, Span, Tile, complement, disjoint, plan
from megatron_longpo.data.layout import RowLayout


@lru_cache(maxsize=256)
def ring_plans(layout: RowLayout, cp_rank: int) -> tuple[Plan, ...]:
    """What one rank computes at each step of the ring.

    Args:
        layout: The row.
        cp_rank: The rank whose queries are computed.

    Returns:
        One plan per step. At step i the keys are those of rank ``(cp_rank - i) % cp_size``, in its local order.
        ``queries_first`` and ``unstored_queries`` are meant across steps: results are allocated once, and step 0 comes
        first. ``keys_first`` and ``unstored_keys`` are meant within a step.
    """
    tiles = plan(layout, cp_rank).tiles
    stored: list[Span] = []
    steps = []
    for step in range(layout.cp_size):
        cut: list[Tile] = []
        for tile, keys in _cut(tiles, layout, (cp_rank - step) % layout.cp_size):
            queries_first = all(disjoint(span, (tile.query_start, tile.query_stop)) for span in stored)
            if queries_first:
                stored.append((tile.query_start, tile.query_stop))
            cut.append(
                replace(
                    tile,
                    key_start=keys[0],
                    key_stop=keys[1],
                    queries_first=queries_first,
                    keys_first=all(disjoint(keys, (t.key_start, t.key_stop)) for t in cut),
                )
            )
        unstored_keys = complement([(t.key_start, t.key_stop) for t in cut if t.keys_first], layout.local_tokens)
        steps.append(Plan(tuple(cut), (), unstored_keys))
    # Own keys hold at least a query itself, so after step 0 every true query has a result.
    first = replace(steps[0], unstored_queries=complement(stored, layout.local_tokens))
    return (first, *steps[1:])


def _cut(tiles: Iterable[Tile], layout: RowLayout, owner: int) -> Iterator[tuple[Tile, Span]]:
    """The tiles that need keys of one rank, each with a range of that rank's local keys."""
    runs = list(_key_runs(layout, owner))
    for tile in tiles:
        spans: list[Span] = []
        for row, length, local in runs:
            start, stop = max(tile.key_start, row), min(tile.key_stop, row + length)
            if start >= stop:
                continue
            span = (local + start - row, local + stop - row)
            if spans and spans[-1][1] == span[0]:
                span = (spans.pop()[0], span[1])
            spans.append(span)
        if tile.causal and spans:
            ((start, stop),) = spans
            assert stop - start == tile.key_stop - tile.key_start, "a mask holds only on the whole of its square"
        yield from ((tile, span) for span in spans)


def _key_runs(layout: RowLayout, cp_rank: int) -> Iterator[tuple[int, int, int]]:
    """Row index, length and local index of the true tokens of every chunk that a rank holds."""
    local = 0
    for segment, start, stop in layout.chunks(cp_rank):
        length = min(stop, segment.stop) - start
        if length > 0:
            yield start, length, local
        local += stop - start
