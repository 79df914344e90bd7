"""Every layout of a run with its predicted time and estimated memory: what is known before any is measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_longpo.config import ModelConfig
from megatron_longpo.data.rows import TrainingRow
from megatron_longpo.planning.estimate import Estimate, estimate
from megatron_longpo.planning.hardware import GPU, usable_gib, usable_host_gib
from megatron_longpo.planning.layouts import Candidate
from megatron_longpo.planning.step_time import StepTime, step_time
from megatron_longpo.planning.workload import Work, num_predictions, work_of

HOST_GAIN = 1.1
"""How many times faster what uses the host's memory must be to come before what does not: links shared with network
cards, and other programs on the host, are not predicted."""


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


@dataclass(frozen=True)
class Timed:
    """A layout, its predicted step and its estimated memory."""

    candidate: Candidate
    time: StepTime
    memory: Estimate

    def may_fit(self, gpu: GPU, margin: float = 1.0) -> bool:
        """Whether the estimate is not above a GPU's memory and its share of the host's, times a margin."""
        return self.memory.gib <= margin * usable_gib(gpu) and self.memory.host_gib <= margin * usable_host_gib(gpu)


def timed_layouts(search: Search, legal: Sequence[Candidate], rows: Sequence[TrainingRow]) -> list[Timed]:
    """Every layout with its predicted step and its estimated memory, the best first, equals in `candidates`' order."""
    predictions = num_predictions(legal[0].config, rows)
    works: dict[tuple[int, int], Work] = {}
    timed = []
    for candidate in legal:
        of_row = (candidate.config.parallel.context_parallel_size, candidate.config.row_multiple)
        if of_row not in works:
            works[of_row] = work_of(candidate.config, rows, predictions)
        work = works[of_row]
        time = step_time(candidate.config, search.num_gpus, work, search.gpu)
        timed.append(Timed(candidate, time, estimate(candidate.config, search.num_gpus, work)))
    return sorted(timed, key=lambda entry: rank(entry.candidate, entry.time))


def rank(candidate: Candidate, time: StepTime) -> float:
    """What layouts are sorted by: predicted seconds, more by `HOST_GAIN` with something in host memory."""
    training, optimizer = candidate.config.training, candidate.config.optimizer
    on_host = training.cpu_offloading_num_layers > 0 or optimizer.optimizer_cpu_offload
    return time.seconds * (HOST_GAIN if on_host else 1.0)
