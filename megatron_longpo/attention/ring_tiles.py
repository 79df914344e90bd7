"""The tiles of a context-parallel ring: those of `tiles.plan`, cut by the rank whose keys they need.

A rank computes on its own keys first, then on those of one rank after another as they arrive. It sends off what other
ranks see: all of its keys, or under a sliding window those that the window of another rank's query reaches, which of a
chunk longer than the window are the last. What is sent lies side by side, so a rectangle on several chunks stays one.
Causal squares are on a rank's own keys: step 0. The flipped ones of a window are on any keys, and fall into a rectangle
and a smaller square for every run of them that a rank holds.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from megatron_longpo.attention.tiles import Plan, Run, Span, Tile, complement, disjoint, held_runs, plan
from megatron_longpo.data.layout import RowLayout, Segment


@dataclass(frozen=True)
class RingPlan:
    """What one rank computes and sends.

    Args:
        steps: One plan per step. Step 0 is on the rank's own keys in their local order, step i on what rank
            ``(cp_rank - i) % cp_size`` sent off. ``queries_first`` and ``unstored_queries`` are meant across steps,
            since results are allocated once; ``keys_first`` and ``unstored_keys`` within a step.
        num_keys: How many keys every step is on.
        sent: Which own keys are sent off, in this order: ranges of the local ones.
    """

    steps: tuple[Plan, ...]
    num_keys: tuple[int, ...]
    sent: tuple[Span, ...]

    @property
    def num_sent(self) -> int:
        """How many own keys are sent off."""
        return sum(stop - start for start, stop in self.sent)


@lru_cache(maxsize=256)
def ring_plan(layout: RowLayout, cp_rank: int) -> RingPlan:
    """What a rank of the ring computes and sends, cached as `tiles.plan` is."""
    tiles = plan(layout, cp_rank).tiles
    sent = sent_runs(layout)
    stored: list[Span] = []
    steps: list[Plan] = []
    num_keys = [layout.local_tokens]
    for step in range(layout.cp_size):
        runs = list(held_runs(layout, cp_rank))
        if step > 0:
            runs = list(_side_by_side(sent[(cp_rank - step) % layout.cp_size]))
            num_keys.append(max(1, sum(run.length for run in runs)))
        cut: list[Tile] = []
        for tile in _cut(tiles, runs):
            queries_first = all(disjoint(tile.query_span, span) for span in stored)
            keys_first = all(disjoint(tile.key_span, t.key_span) for t in cut)
            if queries_first:
                stored.append(tile.query_span)
            cut.append(replace(tile, queries_first=queries_first, keys_first=keys_first))
        stored_keys = [t.key_span for t in cut if t.keys_first]
        steps.append(Plan(tuple(cut), (), complement(stored_keys, num_keys[step])))
    # Own keys hold at least a query itself, so after step 0 every true query has a result.
    steps[0] = replace(steps[0], unstored_queries=complement(stored, layout.local_tokens))
    # Every rank takes part in every hop, if only with a token that nobody sees: NCCL requires it in a group's first.
    return RingPlan(tuple(steps), tuple(num_keys), tuple(run.place for run in sent[cp_rank]) or ((0, 1),))


@lru_cache(maxsize=64)
def sent_runs(layout: RowLayout) -> tuple[tuple[Run, ...], ...]:
    """Of every rank, the runs of its keys that it sends off."""
    held = tuple(tuple(held_runs(layout, rank)) for rank in range(layout.cp_size))
    window_tokens = layout.window_tokens
    if window_tokens is None:
        return held
    queries: dict[Segment, list[tuple[Run, int]]] = {}
    for run, rank in sorted(((run, rank) for rank, runs in enumerate(held) for run in runs), key=lambda q: q[0].row):
        queries.setdefault(run.segment, []).append((run, rank))

    def seen(keys: Run, owner: int) -> Run | None:
        """A run of keys from the first to the last one that another rank's query sees; None if none is seen."""
        spans: list[Span] = []
        for segment in layout.segments_behind(keys.segment):
            # Runs of a segment follow each other, so of those that see the keys the first sees farthest back.
            runs = queries[segment]
            start = bisect_right(runs, keys.position, key=lambda q: q[0].position + q[0].length)
            stop = bisect_left(runs, keys.position + keys.length + window_tokens - 1, key=lambda q: q[0].position)
            of_others = [run for run, rank in runs[start:stop] if rank != owner]
            if of_others:
                last = of_others[-1]
                spans.append((of_others[0].position - window_tokens + 1, last.position + last.length))
        if not spans:
            return None
        origin = keys.row - keys.position
        return keys.overlap(origin + min(first for first, _ in spans), origin + max(stop for _, stop in spans))

    return tuple(tuple(sent for keys in runs if (sent := seen(keys, rank))) for rank, runs in enumerate(held))


def _side_by_side(runs: Iterable[Run]) -> Iterator[Run]:
    """Runs of keys as they lie in what is sent: one behind the other."""
    local = 0
    for run in runs:
        yield replace(run, local=local)
        local += run.length


def _cut(tiles: Iterable[Tile], runs: list[Run]) -> Iterator[Tile]:
    """The parts of tiles that need the keys of these runs, with keys by their local index."""
    for tile in tiles:
        parts = [part for run in runs if (part := run.overlap(*tile.key_span))]
        yield from _of_flipped_square(tile, parts) if tile.flipped else _on_neighbours(tile, parts)


def _on_neighbours(tile: Tile, parts: list[Run]) -> Iterator[Tile]:
    """A rectangle, or a square on own keys: one tile for keys that lie side by side here, if not in the row."""
    spans: list[Span] = []
    for part in parts:
        start, stop = part.place
        if spans and spans[-1][1] == start:
            start, _ = spans.pop()
        spans.append((start, stop))
    key_start, key_stop = tile.key_span
    for start, stop in spans:
        assert not tile.causal or stop - start == key_stop - key_start, "own keys are held in one run"
        yield replace(tile, key_span=(start, stop))


def _of_flipped_square(tile: Tile, parts: list[Run]) -> Iterator[Tile]:
    """A square in which query i sees the keys from i on: queries before a part of the keys see all of it."""
    query_start, key_start = tile.query_span[0], tile.key_span[0]
    for part in parts:
        first = query_start + part.row - key_start
        if first > query_start:
            yield replace(tile, query_span=(query_start, first), key_span=part.place, causal=False, flipped=False)
        yield replace(tile, query_span=(first, first + part.length), key_span=part.place)
