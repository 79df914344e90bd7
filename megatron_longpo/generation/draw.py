"""Randomness that depends on a seed and on names, never on order, worker or time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TypeVar

Item = TypeVar("Item")


def draw(seed: int, *what: object) -> int:
    """A 64-bit number that depends on the seed and the names given, and on nothing else."""
    return int.from_bytes(hashlib.sha256(repr((seed, *what)).encode()).digest()[:8], "big")


def draw_between(low: int, high: int, seed: int, *what: object) -> int:
    """A whole number in ``[low, high]``."""
    return low + draw(seed, *what) % (high - low + 1)


def shuffled(items: Iterable[Item], seed: int, *what: object) -> list[Item]:
    """The items in an order that depends on the seed, the names and the items' places alone."""
    return [item for _, _, item in sorted((draw(seed, *what, i), i, item) for i, item in enumerate(items))]
