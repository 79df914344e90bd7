"""The tiles of a context-parallel ring: those of `tiles.plan`, cut by the rank whose keys they need.

At every step of the ring a rank holds the keys of one rank, in that rank's local order, and computes the parts of its
tiles that have these keys. A rank's two chunks of a segment lie side by side in its local order, so a rectangle on both
of them stays one rectangle. Causal squares are on a rank's own keys: step 0. The flipped ones of a sliding window are on
any keys, and fall into a rectangle and a smaller square for every run of them that a rank holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

from megatron_longpo.attention.tiles import Plan, Run, Span, Tile, complement, disjoint, held_runs, plan
from megatron_longpo.data.layout import RowLayout

_Overlap = tuple[Span, Span]
"""A tile's keys in one run of a rank's keys: counted from the tile's first key, and their local index."""


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
        for tile in _cut(tiles, list(held_runs(layout, (cp_rank - step) % layout.cp_size))):
            queries, keys = (tile.query_start, tile.query_stop), (tile.key_start, tile.key_stop)
            queries_first = all(disjoint(queries, span) for span in stored)
            keys_first = all(disjoint(keys, (t.key_start, t.key_stop)) for t in cut)
            if queries_first:
                stored.append(queries)
            cut.append(replace(tile, queries_first=queries_first, keys_first=keys_first))
        unstored_keys = complement([(t.key_start, t.key_stop) for t in cut if t.keys_first], layout.local_tokens)
        steps.append(Plan(tuple(cut), (), unstored_keys))
    # Own keys hold at least a query itself, so after step 0 every true query has a result.
    first = replace(steps[0], unstored_queries=complement(stored, layout.local_tokens))
    return (first, *steps[1:])


def _cut(tiles: Iterable[Tile], held: Sequence[Run]) -> Iterator[Tile]:
    """The parts of tiles that need the keys of these runs, with keys by their local index."""
    for tile in tiles:
        overlaps: list[_Overlap] = []
        for run in held:
            start, stop = max(tile.key_start, run.row), min(tile.key_stop, run.row + run.length)
            if start < stop:
                local = start + run.local - run.row
                overlaps.append(((start - tile.key_start, stop - tile.key_start), (local, local + stop - start)))
        yield from _of_flipped_square(tile, overlaps) if tile.flipped else _side_by_side(tile, overlaps)


def _side_by_side(tile: Tile, overlaps: list[_Overlap]) -> Iterator[Tile]:
    """A rectangle, or a square on a rank's own keys: one part for keys that lie side by side, whatever their order."""
    spans: list[Span] = []
    for _, span in overlaps:
        if spans and spans[-1][1] == span[0]:
            span = (spans.pop()[0], span[1])
        spans.append(span)
    for start, stop in spans:
        assert not tile.causal or stop - start == tile.key_stop - tile.key_start, "own keys are held in one run"
        yield replace(tile, key_start=start, key_stop=stop)


def _of_flipped_square(tile: Tile, overlaps: list[_Overlap]) -> Iterator[Tile]:
    """Of a square in which query i sees the keys from i on: those before ``first`` see all of a run, a rectangle."""
    for (first, stop), (key_start, key_stop) in overlaps:
        on_run = replace(tile, key_start=key_start, key_stop=key_stop)
        if first:
            yield replace(on_run, query_stop=tile.query_start + first, causal=False, flipped=False)
        yield replace(on_run, query_start=tile.query_start + first, query_stop=tile.query_start + stop)
