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
"""So many times the GPUs are looked at, in powers of two."""

NUM_TRIED = 3
"""Larger numbers of GPUs with a layout that are looked at for one that fits, each a search of seconds."""


def no_layout(search: Search) -> str:
    """No layout passes the trainer's checks on this many GPUs: where one does that is estimated to fit."""
    number = search.num_gpus
    # What does not fit on a number of GPUs does not fit on fewer.
    below = _nearest(search, range(number - 1, 0, -1), num_tried=1)
    above = _nearest(search, range(number + 1, 2 * number + 1), NUM_TRIED)
    nearest = [f"--num-gpus {number} ({layout})" for number, layout in (*below, *above)]
    batches = " or ".join(map(str, _batches(search)))
    if batches:
        nearest.append(f"--global-batch-size {batches} on these {number} GPUs")
    return (
        f"--num-gpus {number} has no possible layout: the number must be a product of sizes that divide the model's "
        f"heads and layers, the row and --global-batch-size; nearest possible: {', or '.join(nearest) or 'none found'}"
    )


def nothing_fits(search: Search, timed: Sequence[Timed]) -> str:
    """The leanest layout here, and the fastest one on the first multiple of the GPUs on which any fits."""
    lean = min(timed, key=lambda entry: (entry.memory.host_gib > usable_host_gib(search.gpu), entry.memory.gib))
    leanest = lean.candidate
    usable = usable_gib(search.gpu)
    text = (
        f"no layout of {search.num_gpus} × {search.gpu.name} fits: the leanest, "
        f"{layout_text(leanest.config, search.num_gpus)}, recomputing {leanest.option.recomputed}, on the host "
        f"{leanest.option.on_host}, needs about {lean.memory.gib:.1f} GiB per GPU and {usable:.1f} are usable"
    )
    factors = (2**power * search.num_gpus for power in range(1, LARGEST_FACTOR.bit_length()))
    for number, layout in _nearest(search, factors):
        return f"{text}; nearest possible: --num-gpus {number} ({layout})"
    return f"{text}; give GPUs with more memory or a shorter --seq-length"


def _nearest(search: Search, numbers: Iterable[int], num_tried: int | None = None) -> list[tuple[int, str]]:
    """The first number of GPUs on which a layout is estimated to fit, and the fastest such layout; empty for none.

    ``num_tried`` is how many numbers with layouts are looked at.
    """
    with_layouts = ((number, legal) for number in numbers if (legal := list(_legal(search, number))))
    for number, legal in islice(with_layouts, num_tried):
        rows = made_up_rows(legal[0].config, search.num_turns, search.response_tokens)
        for entry in timed_layouts(search.on(number), legal, rows):
            if entry.may_fit(search.gpu):
                return [(number, layout_text(entry.candidate.config, number))]
    return []


def _batches(search: Search) -> list[int]:
    """The nearest ``--global-batch-size`` below and above the given one with a layout on this many GPUs."""
    base = list(search.base)
    if "--global-batch-size" not in base:
        return []
    place = base.index("--global-batch-size") + 1
    given = int(base[place])
    # This batch divides over every data-parallel size that there can be.
    base[place] = str(search.num_gpus)
    legal = _legal(dataclasses.replace(search, base=base), search.num_gpus)
    sizes = {one.config.parallel.data_parallel_size(search.num_gpus) for one in legal}
    below = [given // size * size for size in sizes if size < given]
    above = [-(-given // size) * size for size in sizes]
    return [*([max(below)] if below else []), *([min(above)] if above else [])]


def _legal(search: Search, num_gpus: int) -> Iterator[Candidate]:
    return candidates(search.base, search.model, num_gpus, search.gpu.gpus_per_node, search.source)
