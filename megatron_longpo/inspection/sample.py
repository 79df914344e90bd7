"""A sample of pairs that depends on the seed and the ids alone: not on the order of files, nor on their number."""

from __future__ import annotations

import heapq
from collections.abc import Callable

from megatron_longpo.generation.draw import draw
from megatron_longpo.inspection.view import PairView


class Sample:
    """Keeps the pairs with the smallest keys; memory holds those and no others.

    Args:
        size: How many.
        seed: Another seed, another sample.
    """

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._seed = seed
        self._num_offered = 0
        # Negative keys: the heap's first is the one to go next.
        self._heap: list[tuple[int, int, PairView]] = []

    def offer(self, document_id: str, turn: int, make_view: Callable[[], PairView]) -> None:
        """Consider a pair; its view is made only if it is kept, for now."""
        self._num_offered += 1
        key = draw(self._seed, document_id, turn)
        if len(self._heap) < self._size:
            heapq.heappush(self._heap, (-key, self._num_offered, make_view()))
        elif self._size and key < -self._heap[0][0]:
            heapq.heapreplace(self._heap, (-key, self._num_offered, make_view()))

    def views(self) -> list[PairView]:
        """The sample, in the order it was read."""
        return [view for _, _, view in sorted(self._heap, key=lambda entry: entry[1])]
