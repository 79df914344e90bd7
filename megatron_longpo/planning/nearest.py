"""What to say where no layout can run or none fits: the nearest that can."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from megatron_longpo.planning.hardware import usable_gib, usable_host_gib
from megatron_longpo.planning.layouts import Candidate, candidates
from megatron_longpo.planning.tables import layout_text
from megatron_longpo.planning.timed_layouts import Search, Timed, timed_layouts
from megatron_longpo.planning.workload import made_up_rows

LARGEST_FACTOR = 32
"""So many times the GPUs are looked at, in powers of two or powers of two of nodes."""

NUM_TRIED = 3
"""Larger numbers of GPUs, and batches, with a layout that are looked at for one that fits, each a search of seconds."""

NO_NUMBER = "give GPUs with more memory or a shorter --seq-length"
"""What is left where no number of GPUs is enough."""


def no_layout(search: Search) -> str:
    """No layout passes the trainer's checks on this many GPUs: where one does that is estimated to fit."""
    number = search.num_gpus
    # What does not fit on a number of GPUs does not fit on fewer.
    below = _nearest(map(search.on, range(number - 1, 0, -1)), num_tried=1)
    above = _nearest(map(search.on, range(number + 1, 2 * number + 1)), NUM_TRIED)
    nearest = [f"--num-gpus {found.num_gpus} ({layout})" for found, layout in (*below, *above)]
    batches = " or ".join(map(str, _batches(search)))
    if batches:
        nearest.append(f"--global-batch-size {batches} on these {number} GPUs")
    if not nearest:
        # Nothing fits on about as many.
        nodes = (search.gpu.gpus_per_node * 2**power for power in range((LARGEST_FACTOR * number).bit_length()))
        more = (gpus for gpus in nodes if 2 * number < gpus <= LARGEST_FACTOR * number)
        nearest = [f"--num-gpus {found.num_gpus} ({layout})" for found, layout in _nearest(map(search.on, more))]
    return (
        f"--num-gpus {number} has no possible layout: the number must be a product of sizes that divide the model's "
        "heads and layers, the row and --global-batch-size; nearest possible: "
        + (", or ".join(nearest) or f"none that fits, {NO_NUMBER}")
    )


def nothing_fits(search: Search, timed: Sequence[Timed]) -> str:
    """The leanest layout here, and the fastest one on the first multiple of the GPUs on which any fits."""
    lean = min(timed, key=lambda entry: (entry.memory.host_gib > usable_host_gib(search.gpu), entry.memory.gib))
    leanest = lean.candidate
    usable = usable_gib(search.gpu)
    text = (
        f"no layout of {search.num_gpus} × {search.gpu.name} fits: the leanest, "
        f"{layout_text(leanest.config, search.num_gpus)}, recomputing {leanest.option.recomputed}, on the host "
        f"{leanest.option.on_host}, needs about {lean.memory.gib:.2f} GiB per GPU and {usable:.2f} are usable"
    )
    factors = (2**power * search.num_gpus for power in range(1, LARGEST_FACTOR.bit_length()))
    for found, layout in _nearest(map(search.on, factors)):
        return f"{text}; nearest possible: --num-gpus {found.num_gpus} ({layout})"
    return f"{text}; {NO_NUMBER}"


def _nearest(searches: Iterable[Search], num_tried: int | None = None) -> list[tuple[Search, str]]:
    """The first search with a layout that is estimated to fit, and the fastest such layout; empty for none.

    ``num_tried`` is how many searches with layouts are looked at.
    """
    with_layouts = ((search, legal) for search in searches if (legal := list(_legal(search))))
    for search, legal in islice(with_layouts, num_tried):
        rows = made_up_rows(legal[0].config, search.num_turns, search.response_tokens)
        for entry in timed_layouts(search, legal, rows):
            if entry.may_fit(search.gpu):
                return [(search, layout_text(entry.candidate.config, search.num_gpus))]
    return []


def _batches(search: Search) -> list[int]:
    """The nearest ``--global-batch-size`` below and above the given one with which a layout of these GPUs fits."""
    place = search.base.index("--global-batch-size") + 1
    given = int(search.base[place])

    def with_batch(batch: int) -> Search:
        return dataclasses.replace(search, base=[*search.base[:place], str(batch), *search.base[place + 1 :]])

    # This batch divides over every data-parallel size that there can be.
    legal = _legal(with_batch(search.num_gpus))
    sizes = {one.config.parallel.data_parallel_size(search.num_gpus) for one in legal}
    below = sorted({given // size * size for size in sizes if size < given}, reverse=True)
    above = sorted({-(-given // size) * size for size in sizes})
    found = [_nearest(map(with_batch, batches), NUM_TRIED) for batches in (below, above)]
    return [int(one.base[place]) for side in found for one, _ in side]


def _legal(search: Search) -> Iterator[Candidate]:
    return candidates(search.base, search.model, search.num_gpus, search.gpu.gpus_per_node, search.source)
