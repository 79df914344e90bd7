"""Many numbers in little memory, and their histogram."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


class Numbers:
    """Numbers that arrive one by one; 8 bytes each."""

    def __init__(self) -> None:
        self._values = array("d")

    def add(self, value: float) -> None:
        """One more."""
        self._values.append(value)

    def __len__(self) -> int:
        return len(self._values)

    def values(self) -> NDArray[np.float64]:
        """All, in the order they came: float64 ``[count]``."""
        return np.array(self._values)

    def quantiles(self) -> tuple[float, float, float, float]:
        """Minimum, median, 95th percentile and maximum."""
        low, middle, high, top = np.quantile(self.values(), [0, 0.5, 0.95, 1]).tolist()
        return low, middle, high, top


@dataclass(frozen=True)
class Histogram:
    """Counts of numbers between edges.

    Args:
        edges: ``[bins + 1]``, rising by equal steps.
        counts: ``[bins]``; the last bin also holds everything above.
        has_more_above: Whether there is anything above the last edge.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    has_more_above: bool


def histogram(values: NDArray[np.float64], num_bins: int = 20) -> Histogram:
    """Whole numbers counted from zero up, in round steps; the upper hundredth does not stretch the axis."""
    top = float(np.quantile(values, 0.99))
    step = max(1.0, round_step(max(top, 1e-9) / num_bins))
    num_steps = max(1, math.floor(top / step) + 1)
    edges = np.arange(num_steps + 1) * step
    counts, _ = np.histogram(np.minimum(values, edges[-1]), edges)
    above = float(values.max()) > edges[-1]
    return Histogram(tuple(edges.tolist()), tuple(counts.tolist()), above)


def round_step(at_least: float) -> float:
    """The next number up of the form 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(at_least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= at_least * (1 - 1e-9))
