"""Which kernel calls make shared-prefix attention: the mask of a row cut into causal squares and full rectangles.

Any kernel that returns (out, log-sum-exp) can compute a square-causal or a full tile; tiles of the same queries are
merged by their log-sum-exp. For one document on one rank the tiles are

    prefix on prefix (causal) · all branches on the prefix (one rectangle) · each branch on itself (causal).

A context-parallel rank holds two chunks of every segment (zigzag); each chunk sees the chunks before it as a rectangle
and itself causally. True tokens only: padding is in no tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from itertools import groupby

from megatron_longpo.data.layout import PREFIX, RowLayout


@dataclass(frozen=True)
class Tile:
    """One kernel call: queries [query_start, query_stop) on keys [key_start, key_stop).

    Queries count in the order in which the rank holds them, keys in row order. A causal tile is square.
    """

    query_start: int
    query_stop: int
    key_start: int
    key_stop: int
    causal: bool


@dataclass(frozen=True)
class QueryBlock:
    """Adjacent queries and all tiles that touch them. The first tile covers the whole block."""

    start: int
    stop: int
    tiles: tuple[Tile, ...]


@lru_cache(maxsize=256)
def plan(layout: RowLayout, cp_rank: int | None = None) -> tuple[QueryBlock, ...]:
    """The query blocks of a row, in order; blocks do not overlap, and queries outside of all blocks are padding.

    Args:
        layout: The row.
        cp_rank: Whose queries; None takes the whole padded row in row order.
    """
    if cp_rank is None:
        pieces = [(s, s.start, s.start + s.padded_tokens) for s in layout.segments]
    else:
        pieces = list(layout.chunks(cp_rank))
    blocks: list[QueryBlock] = []
    local = 0
    for segment, start, stop in pieces:
        num_queries = min(stop, segment.stop) - start
        if num_queries > 0:
            tiles = [Tile(local, local + num_queries, start, start + num_queries, causal=True)]
            if start > segment.start:
                tiles.insert(0, Tile(local, local + num_queries, segment.start, start, causal=False))
            if segment.branch != PREFIX:
                prefix_stop = segment.prefix_start + segment.prefix_tokens
                tiles.insert(0, Tile(local, local + num_queries, segment.prefix_start, prefix_stop, causal=False))
            blocks.append(QueryBlock(local, local + num_queries, tuple(tiles)))
        local += stop - start
    return tuple(_merged(blocks))


def _merged(blocks: list[QueryBlock]) -> list[QueryBlock]:
    """Join adjacent blocks that begin with a rectangle on the same keys: one large kernel call for all branches."""
    run = 0
    runs = []
    for previous, block in zip([None, *blocks], blocks, strict=False):
        first = block.tiles[0]
        joins = (
            previous is not None
            and previous.stop == block.start
            and not first.causal
            and not previous.tiles[0].causal
            and (previous.tiles[0].key_start, previous.tiles[0].key_stop) == (first.key_start, first.key_stop)
        )
        run += not joins
        runs.append((run, block))
    joined = []
    for _, group in groupby(runs, key=lambda item: item[0]):
        members = [block for _, block in group]
        start, stop = members[0].start, members[-1].stop
        first = members[0].tiles[0]
        rest = [tile for block in members for tile in block.tiles[1:]]
        joined.append(
            QueryBlock(start, stop, (Tile(start, stop, first.key_start, first.key_stop, first.causal), *rest))
            if len(members) > 1
            else members[0]
        )
    return joined
