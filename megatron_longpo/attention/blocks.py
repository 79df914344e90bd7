"""Cut tiles into a part whose sides are whole blocks, and what is left over.

A kernel that prepares itself for every new shape needs few shapes, but documents have ever new lengths. In whole blocks
the tiles of all of them have few.

    causal square    a square of whole blocks, what comes behind it on its keys, and a small square
    rectangle        whole blocks on whole blocks, the same queries on the last keys, and the last queries on all keys
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

from megatron_longpo.attention.band import Span
from megatron_longpo.attention.tiles import Plan, Tile


@lru_cache(maxsize=1024)
def in_blocks(tiles: Plan, block_tokens: int, smallest_tokens: int) -> Plan:
    """A plan with its tiles cut, cached for as long as the plan is the same object.

    Args:
        tiles: The plan.
        block_tokens: What both sides of a tile's first part become multiples of.
        smallest_tokens: Tiles whose first part would have a shorter side stay as they are.
    """
    cut = (part for tile in tiles.tiles for part in _parts(tile, block_tokens, smallest_tokens))
    return replace(tiles, tiles=tuple(cut))


def are_blocks(num_queries: int, num_keys: int, block_tokens: int, smallest_tokens: int) -> bool:
    """Whether a tile with these sides is the first part of one that was cut."""
    sides = num_queries, num_keys
    return min(sides) >= smallest_tokens and not any(side % block_tokens for side in sides)


def _parts(tile: Tile, block_tokens: int, smallest_tokens: int) -> Iterator[Tile]:
    queries, last_queries = _whole_and_rest(tile.query_span, block_tokens, tile.flipped)
    keys, last_keys = _whole_and_rest(tile.key_span, block_tokens, tile.flipped)
    if min(stop - start for start, stop in (queries, keys)) < smallest_tokens:
        yield tile
        return
    yield replace(tile, query_span=queries, key_span=keys)
    rectangle = replace(tile, causal=False, flipped=False)
    if tile.causal and _length(last_queries):
        yield replace(rectangle, query_span=last_queries, key_span=keys, keys_first=False)
        yield replace(tile, query_span=last_queries, key_span=last_keys, queries_first=False)
    if not tile.causal and _length(last_keys):
        yield replace(rectangle, query_span=queries, key_span=last_keys, queries_first=False)
    if not tile.causal and _length(last_queries):
        yield replace(rectangle, query_span=last_queries, keys_first=False)


def _whole_and_rest(span: Span, block_tokens: int, backwards: bool) -> tuple[Span, Span]:
    """The whole blocks that a span begins with, read forwards or backwards, and the rest."""
    start, stop = span
    rest = (stop - start) % block_tokens
    return ((start + rest, stop), (start, start + rest)) if backwards else ((start, stop - rest), (stop - rest, stop))


def _length(span: Span) -> int:
    return span[1] - span[0]
