"""What the ranks of a ring send and compute, counted for all of them together: the numbers that a step's time needs.

`attention.ring_tiles` plans one rank's kernel calls; the plans of all ranks would give the same numbers, much later.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from megatron_longpo.attention.ring_tiles import sent_runs
from megatron_longpo.attention.tiles import held_runs
from megatron_longpo.data.layout import RowLayout, Segment


@lru_cache(maxsize=1024)
def hop_tokens(layout: RowLayout) -> int:
    """Tokens whose keys make a hop of a ring as long as it is: the most that a rank sends off (`ring_tiles`).

    ``layout`` has the ring's ranks. Without a window these are all tokens of a rank.
    """
    if layout.window_tokens is None:
        return layout.local_tokens
    return max(1, *(sum(run.length for run in runs) for runs in sent_runs(layout)))


@lru_cache(maxsize=1024)
def step_shares(layout: RowLayout) -> tuple[float, ...]:
    """The share of a ring's attention that each of its steps has.

    Zigzag chunks make steps alike. Under a window most of what a query sees is on its own rank, so on step 0.
    """
    if layout.window_tokens is None:
        return (1 / layout.cp_size,) * layout.cp_size
    pairs = step_pairs(layout, layout.window_tokens)
    return tuple(number / sum(pairs) for number in pairs)


def step_pairs(layout: RowLayout, window_tokens: int) -> list[int]:
    """Query-key pairs that all ranks together compute in each step of a ring under a window.

    Counted between runs of neighbouring tokens, in closed form.
    """
    runs: dict[Segment, list[tuple[int, int, int]]] = {segment: [] for segment in layout.segments}
    for rank in range(layout.cp_size):
        for run in held_runs(layout, rank):
            runs[run.segment].append((rank, run.position, run.position + run.length))
    arrays = {segment: np.array(of_segment).T for segment, of_segment in runs.items()}
    pairs = np.zeros(layout.cp_size)  # whole numbers, exact below 2^53
    for segment, (owners, *keys) in arrays.items():
        for behind in layout.segments_behind(segment):
            ranks, *queries = arrays[behind][:, :, None]
            visible = _pairs_from(0, queries, keys) - _pairs_from(window_tokens, queries, keys)
            pairs += np.bincount((ranks - owners).ravel() % layout.cp_size, visible.ravel(), layout.cp_size)
    return [int(number) for number in pairs]


def _pairs_from(
    distance: int, queries: Sequence[NDArray[np.int64]], keys: Sequence[NDArray[np.int64]]
) -> NDArray[np.int64]:
    """Pairs of runs' tokens of which the query lies at least so far behind the key; runs are (first, stop)."""

    def triangle(query_stop: NDArray[np.int64], key_start: NDArray[np.int64]) -> NDArray[np.int64]:
        """Pairs of all queries before one position and all keys from another one on."""
        side = np.maximum(query_stop - key_start - distance, 0)
        return side * (side + 1) // 2

    (first, stop), (key_start, key_stop) = queries, keys
    return triangle(stop, key_start) - triangle(first, key_start) - triangle(stop, key_stop) + triangle(first, key_stop)
