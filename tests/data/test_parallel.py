"""ordered_map: in order, no faster than it is read, and gone when it ends."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator

import pytest

from megatron_longpo.data.parallel import ordered_map


def make_adder(add: int) -> Callable[[int], tuple[int, int]]:
    def work(item: int) -> tuple[int, int]:
        if item == 13:
            raise ValueError("13 is bad luck")
        if item == 99:
            os._exit(3)
        return item + add, os.getpid()

    return work


@pytest.mark.parametrize("num_workers", [1, 2])
def test_results_in_the_order_of_the_items(num_workers: int) -> None:
    results = list(ordered_map(make_adder, (100,), range(12), num_workers))
    assert [result for result, _ in results] == list(range(100, 112))
    processes = {process for _, process in results}
    assert (processes == {os.getpid()}) == (num_workers == 1)


def test_items_are_read_only_as_fast_as_results_are_taken() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(1_000):
            taken.append(item)
            yield 0

    results = ordered_map(make_adder, (0,), items(), 2)
    for _ in range(5):
        next(results)
    assert len(taken) <= 5 + 2 * 2
    results.close()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("num_workers", [1, 2])
def test_errors_of_the_function_pass_through(num_workers: int) -> None:
    results = ordered_map(make_adder, (0,), [12, 13, 14], num_workers)
    assert next(results)[0] == 12
    with pytest.raises(ValueError, match="bad luck"):
        next(results)
    assert not multiprocessing.active_children()


def test_errors_of_the_items_pass_through() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("line 2 is broken")

    with pytest.raises(ValueError, match="line 2"):
        list(ordered_map(make_adder, (0,), items(), 2))


def test_a_worker_that_dies_is_an_error_not_a_hang() -> None:
    with pytest.raises(ValueError, match=r"worker process died.*--workers 2"):
        list(ordered_map(make_adder, (0,), [1, 99, 2], 2))


def test_at_least_one_worker() -> None:
    with pytest.raises(ValueError, match="--workers 0"):
        list(ordered_map(make_adder, (0,), [1], 0))
