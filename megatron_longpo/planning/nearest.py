"""What to say where no layout can run or none fits: the nearest that can."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_longpo.planning.hardware import usable_gib, usable_host_gib
from megatron_longpo.planning.layouts import Candidate, candidates
from megatron_longpo.planning.search import Search, Timed, timed_layouts
from megatron_longpo.planning.tables import layout_text
from megatron_longpo.planning.workload import made_up_rows

LARGEST_FACTOR = 32
"""So many times the GPUs are looked at, in powers of two."""


def no_layout(search: Search) -> str:
    """No layout passes the trainer's checks on this many GPUs."""
    nearest: list[str] = []
    for distance in range(1, search.num_gpus + 1):
        for number in (search.num_gpus - distance, search.num_gpus + distance):
            option = next(_legal(search, number), None) if number > 0 else None
            if option is not None:
                nearest.append(f"{number} ({layout_text(option.config, number)})")
        if nearest:
            break
    return (
        f"--num-gpus {search.num_gpus} has no possible layout: the number must be a product of sizes that divide the "
        f"model's heads and layers, the row and --global-batch-size; nearest possible: {' or '.join(nearest)}"
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
    rows = made_up_rows(leanest.config, search.num_turns, search.response_tokens)
    factor = 2
    while factor <= LARGEST_FACTOR:
        number = factor * search.num_gpus
        larger = search.on(number)
        for entry in timed_layouts(larger, list(_legal(search, number)), rows):
            if entry.may_fit(search.gpu):
                return f"{text}; nearest possible: --num-gpus {number} ({layout_text(entry.candidate.config, number)})"
        factor *= 2
    return f"{text}; give GPUs with more memory or a shorter --seq-length"


def _legal(search: Search, num_gpus: int) -> Iterator[Candidate]:
    return candidates(search.base, search.model, num_gpus, search.gpu.gpus_per_node, search.source)
