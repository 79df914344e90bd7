"""Rank the layouts of a run: predict all, measure the best until enough of them fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_longpo.arguments import parse_arguments
from megatron_longpo.config import ConfigError
from megatron_longpo.data.rows import TrainingRow
from megatron_longpo.planning.dry_run import RankMemory
from megatron_longpo.planning.hardware import GPU, usable_gib, usable_host_gib
from megatron_longpo.planning.layouts import Candidate, candidates, fills_nodes
from megatron_longpo.planning.nearest import no_layout, nothing_fits
from megatron_longpo.planning.parallel_dry_runs import dry_runs
from megatron_longpo.planning.step_time import StepTime
from megatron_longpo.planning.timed_layouts import Search, Timed, rank, timed_layouts
from megatron_longpo.planning.workload import made_up_rows
from megatron_longpo.validation import validate

ESTIMATE_MARGIN = 1.03
"""Layouts whose estimate is above the memory by more than this are not measured; it errs by a few percent."""

MAX_MEASURED = 12
"""Layouts to measure at most."""


@dataclass(frozen=True)
class Plan:
    """One layout with what is known of it.

    Args:
        candidate: The layout.
        time: Predicted step.
        memory: Measured peaks of its first and last pipeline stage.
    """

    candidate: Candidate
    time: StepTime
    memory: tuple[RankMemory, ...]

    @property
    def gib(self) -> float:
        """Peak memory of the fullest rank, GiB."""
        return max(stage.gib for stage in self.memory)

    @property
    def host_gib(self) -> float:
        """Host memory of the fullest rank, GiB."""
        return max(stage.host_gib for stage in self.memory)

    def fits(self, gpu: GPU) -> bool:
        """Whether its fullest ranks have room on this GPU and on its host."""
        return self.gib <= usable_gib(gpu) and self.host_gib <= usable_host_gib(gpu)


def find_plans(search: Search) -> list[Plan]:
    """The fastest layouts that fit, fastest first, their memory measured.

    Raises:
        ConfigError: No layout can run on this many GPUs, or none fits; the message has the nearest that can.
    """
    _check(search)
    legal = list(candidates(search.base, search.model, search.num_gpus, search.gpu.gpus_per_node, search.source))
    if not legal:
        raise ConfigError(no_layout(search))
    rows = made_up_rows(legal[0].config, search.num_turns, search.response_tokens)
    timed = timed_layouts(search, legal, rows)
    possible = [entry for entry in timed if entry.may_fit(search.gpu, ESTIMATE_MARGIN)]
    plans: list[Plan] = []
    measured = 0
    while possible and len(plans) < search.num_plans and measured < MAX_MEASURED:
        chosen = _best_of_sizes(possible)[: search.num_plans - len(plans)]
        measured += len(chosen)
        tried = list(zip(chosen, _measured(search, chosen, rows), strict=True))
        found = [plan for _, plan in tried if plan.fits(search.gpu)]
        plans += found
        # Of sizes that have a plan, what saves more memory or sends more bytes is of no interest.
        done = {_sizes(plan.candidate) for plan in found}
        possible = [e for e in possible if e not in chosen and _sizes(e.candidate) not in done]
        for estimated, plan in tried:
            possible = [entry for entry in possible if _may_fit_beside(entry, estimated, plan, search.gpu)]
    if not plans and possible and measured >= MAX_MEASURED:
        # The fastest were estimated too low; the leanest may fit all the same.
        leanest = min(possible, key=lambda entry: entry.memory.gib)
        plans = [plan for plan in _measured(search, [leanest], rows) if plan.fits(search.gpu)]
    if not plans:
        raise ConfigError(nothing_fits(search, timed))
    return sorted(plans, key=lambda plan: rank(plan.candidate, plan.time))[: search.num_plans]


def _check(search: Search) -> None:
    """Mistakes that every layout would have; one by one they would all be left out without a word."""
    per_node = search.gpu.gpus_per_node
    if not fills_nodes(search.num_gpus, per_node):
        less = search.num_gpus // per_node * per_node
        raise ConfigError(
            f"--num-gpus {search.num_gpus} must be a multiple of --gpus-per-node {per_node}, or at most that; "
            f"nearest possible: {less} or {less + per_node}"
        )
    config = parse_arguments(search.base).with_model(search.model, search.source)
    validate(config.with_device_defaults("local", "nccl"), 1)


def _best_of_sizes(timed: Sequence[Timed]) -> list[Timed]:
    """The best of every split over TP, PP and CP: neighbours in the whole list hardly differ."""
    best: dict[tuple[int, int, int], Timed] = {}
    for entry in timed:
        best.setdefault(_sizes(entry.candidate), entry)
    return list(best.values())


def _may_fit_beside(entry: Timed, estimated: Timed, measured: Plan, gpu: GPU) -> bool:
    """Whether a layout may fit after one was measured: of the same sizes, estimates are off by about the same factor.

    Without it a layout that fails by a little is followed by all of its kind, which hold as much.
    """
    if measured.fits(gpu) or _sizes(entry.candidate) != _sizes(measured.candidate):
        return True
    if measured.gib > usable_gib(gpu):
        return entry.memory.gib * measured.gib / estimated.memory.gib <= usable_gib(gpu)
    return entry.memory.host_gib * measured.host_gib / estimated.memory.host_gib <= usable_host_gib(gpu)


def _sizes(candidate: Candidate) -> tuple[int, int, int]:
    parallel = candidate.config.parallel
    return (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )


def _measured(search: Search, chosen: Sequence[Timed], rows: Sequence[TrainingRow]) -> list[Plan]:
    for entry in chosen:
        validate(entry.candidate.config, search.num_gpus)
    runs = [(entry.candidate.config, search.num_gpus) for entry in chosen]
    memories = dry_runs(runs, rows, f"dry runs of {len(runs)} layouts" if len(runs) > 1 else "dry run of a layout")
    return [Plan(entry.candidate, entry.time, tuple(stages)) for entry, stages in zip(chosen, memories, strict=True)]
