"""Rank the layouts of a run: predict all, measure the best until enough of them fit."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm

from megatron_longpo.config import ConfigError, ModelConfig
from megatron_longpo.data.rows import TrainingRow
from megatron_longpo.planning.dry_run import RankMemory
from megatron_longpo.planning.estimate import estimated_gib
from megatron_longpo.planning.hardware import GPU, usable_gib
from megatron_longpo.planning.layouts import Candidate, candidates
from megatron_longpo.planning.parallel_dry_runs import dry_runs
from megatron_longpo.planning.step_time import StepTime, step_time
from megatron_longpo.planning.workload import made_up_rows, num_predictions, work_of

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


Timed = tuple[Candidate, StepTime, float]
"""A layout, its predicted step and its estimated GiB."""


@dataclass(frozen=True)
class Search:
    """What is to be planned.

    Args:
        base: Flags of the run that no layout changes.
        model: The checkpoint's shape.
        source: Names the checkpoint in error messages.
        num_gpus: Ranks.
        gpu: What they are.
        num_turns, response_tokens: Of the documents, which are as long as ``--seq-length`` allows.
        num_plans: How many layouts to find.
    """

    base: Sequence[str]
    model: ModelConfig
    source: str
    num_gpus: int
    gpu: GPU
    num_turns: int
    response_tokens: int
    num_plans: int

    def on(self, num_gpus: int) -> Search:
        """The same on another number of GPUs."""
        return dataclasses.replace(self, num_gpus=num_gpus)


def find_plans(search: Search) -> list[Plan]:
    """The fastest layouts that fit, fastest first, their memory measured.

    Raises:
        ConfigError: No layout can run on this many GPUs, or none fits; the message has the nearest that can.
    """
    # The messages search again, on other numbers of GPUs.
    from megatron_longpo.planning.nearest import no_layout, nothing_fits

    legal = list(candidates(search.base, search.model, search.num_gpus, search.gpu.gpus_per_node, search.source))
    if not legal:
        raise ConfigError(no_layout(search))
    rows = made_up_rows(legal[0].config, search.num_turns, search.response_tokens)
    timed = timed_layouts(search, legal, rows)
    usable = usable_gib(search.gpu)
    possible = [(option, time) for option, time, gib in timed if gib <= ESTIMATE_MARGIN * usable]
    plans: list[Plan] = []
    measured = 0
    with tqdm(desc="dry runs", unit="stage", file=sys.stderr, disable=not sys.stderr.isatty(), leave=False) as bar:
        while len(plans) < search.num_plans and measured < min(MAX_MEASURED, len(possible)):
            chosen = possible[measured : measured + search.num_plans - len(plans)]
            measured += len(chosen)
            plans += [plan for plan in _measured(search, chosen, rows, bar) if plan.gib <= usable]
    if not plans:
        raise ConfigError(nothing_fits(search, timed))
    return sorted(plans, key=lambda plan: plan.time.seconds)[: search.num_plans]


def timed_layouts(search: Search, legal: Sequence[Candidate], rows: Sequence[TrainingRow]) -> list[Timed]:
    """Every layout with its predicted step and its estimated GiB, fastest first."""
    predictions = num_predictions(legal[0].config, rows)
    timed = []
    for option in legal:
        work = work_of(option.config, rows, predictions)
        time = step_time(option.config, search.num_gpus, work, search.gpu)
        timed.append((option, time, estimated_gib(option.config, search.num_gpus, work)))
    return sorted(timed, key=lambda entry: entry[1].seconds)


def _measured(
    search: Search,
    chosen: Sequence[tuple[Candidate, StepTime]],
    rows: Sequence[TrainingRow],
    bar: tqdm,  # type: ignore[type-arg]
) -> list[Plan]:
    before = bar.n

    def done(finished: int, total: int) -> None:
        bar.total = before + total
        bar.update(before + finished - bar.n)

    memories = dry_runs([(option.config, search.num_gpus) for option, _ in chosen], rows, done)
    return [Plan(option, time, tuple(stages)) for (option, time), stages in zip(chosen, memories, strict=True)]
