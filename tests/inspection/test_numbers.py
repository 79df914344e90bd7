"""Numbers and histograms."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_longpo.inspection.numbers import Numbers, histogram, round_step


def test_quantiles_are_numpys() -> None:
    numbers = Numbers()
    for value in (5, 1, 4, 2, 3):
        numbers.add(value)
    assert len(numbers) == 5
    assert numbers.quantiles() == (1.0, 3.0, pytest.approx(4.8), 5.0)


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=200))
def test_every_number_is_in_one_bin(values: list[int]) -> None:
    shown = histogram(np.array(values, dtype=np.float64))
    assert sum(shown.counts) == len(values)
    assert len(shown.edges) == len(shown.counts) + 1 <= 23
    assert shown.has_more_above == (max(values) > shown.edges[-1])


def test_one_giant_does_not_stretch_the_axis() -> None:
    shown = histogram(np.array([*range(1, 200), 10**6], dtype=np.float64))
    assert shown.edges[-1] <= 220 and shown.has_more_above


@pytest.mark.parametrize(
    ("at_least", "step"), [(1, 1), (1.01, 2), (3, 5), (5.1, 10), (0.03, 0.05), (150, 200), (1e-9, 1e-9)]
)
def test_steps_are_round(at_least: float, step: float) -> None:
    assert round_step(at_least) == pytest.approx(step)
