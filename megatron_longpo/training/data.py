"""From the dataset to this rank's micro-batches of every step."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron.core import parallel_state
from torch.utils.data import DataLoader, Dataset

from megatron_longpo.config import RunConfig
from megatron_longpo.data.batch import Batch, collate
from megatron_longpo.data.dataset import PreferenceDataset
from megatron_longpo.data.rows import OBJECTIVE_ROLES
from megatron_longpo.data.sampler import GlobalBatchSampler
from megatron_longpo.processes import outlive_sigterm
from megatron_longpo.training.sidecar import ReferenceLogprobs


class MicroBatches(Dataset[Batch]):
    """Collates the micro-batch of given document numbers for one context-parallel rank; picklable for workers."""

    def __init__(self, config: RunConfig, dataset: PreferenceDataset, reference: ReferenceLogprobs | None) -> None:
        self.config, self.dataset, self.reference = config, dataset, reference
        self.cp_rank = parallel_state.get_context_parallel_rank()

    def __getitem__(self, numbers: tuple[int, ...]) -> Batch:
        config = self.config
        roles = OBJECTIVE_ROLES[config.objective.objective]
        return collate(
            [self.dataset.row(number, config.objective.turns, roles) for number in numbers],
            objective=config.objective,
            cp_size=config.parallel.context_parallel_size,
            cp_rank=self.cp_rank,
            row_multiple=config.row_multiple,
            max_sequence_tokens=config.data.seq_length,
            reference=self.reference,
        )


def check_lengths(
    config: RunConfig, dataset: PreferenceDataset, train_numbers: list[int], eval_numbers: list[int]
) -> None:
    """Refuse a run that would meet a document longer than ``--seq-length``, which may be days after its start."""
    settings = config.training
    used = [] if settings.skip_train else train_numbers
    used = used + eval_numbers[: settings.eval_iters * settings.global_batch_size]
    roles = OBJECTIVE_ROLES[config.objective.objective]
    dataset.check_lengths(used, config.objective.turns, roles, config.data.seq_length)


@dataclass(frozen=True)
class GlobalBatch:
    """One step's data on one rank: its micro-batches, and the documents of the whole global batch."""

    micro_batches: list[Batch]
    numbers: list[int]


def training_batches(micro_batches: MicroBatches, sampler: GlobalBatchSampler) -> Iterator[GlobalBatch]:
    """Every step's micro-batches of this rank, read ahead by ``--num-workers`` processes."""
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    settings = micro_batches.config
    drawn: list[tuple[list[int], int]] = []

    def dealt() -> Iterator[tuple[int, ...]]:
        for numbers in sampler:
            mine = sampler.microbatches(numbers, settings.training.micro_batch_size, rank, size)
            drawn.append((numbers, len(mine)))
            yield from (tuple(part) for part in mine)

    loader = iter(
        DataLoader(
            micro_batches,
            sampler=dealt(),  # type: ignore[arg-type]
            batch_size=None,
            num_workers=settings.data.num_workers,
            worker_init_fn=partial(_leave_signals_to_rank, settings.training.exit_signal_handler),
        )
    )
    for first in loader:
        numbers, count = drawn.pop(0)
        yield GlobalBatch([first, *(next(loader) for _ in range(count - 1))], numbers)


def _leave_signals_to_rank(exit_signal_handler: bool, worker: int) -> None:
    """Ignore signals: a worker that dies of one ends its rank or prints over it; the rank ends its workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = _silent_about_connections
    if exit_signal_handler:
        outlive_sigterm()


def _silent_about_connections(kind: type[BaseException], *error: Any) -> None:
    """Keep quiet about the connection that an interrupted rank closes while a thread of its worker sends on it."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, *error)


def evaluation_batches(micro_batches: MicroBatches, numbers: list[int]) -> Iterator[tuple[GlobalBatch, list[int]]]:
    """All of the given documents once, in groups as large as a training step.

    The last group is filled up with repeats, since all ranks must run the same number of micro-batches, and the
    interleaved schedule whole rounds of the pipeline.

    Yields:
        The group, and how many documents of each of its micro-batches are no repeats (they come first).
    """
    settings, parallel = micro_batches.config.training, micro_batches.config.parallel
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    interleaved = parallel.num_layers_per_virtual_pipeline_stage is not None
    round_size = size * parallel.pipeline_model_parallel_size if interleaved else size
    row = settings.micro_batch_size
    for start in range(0, len(numbers), settings.global_batch_size):
        group = numbers[start : start + settings.global_batch_size]
        rows = [group[i : i + row] for i in range(0, len(group), row)]
        while len(rows) % round_size:
            rows.append([])
        mine = rows[rank::size]
        filled = [tuple(part + group[:1] * (row - len(part))) for part in mine]
        yield GlobalBatch([micro_batches[part] for part in filled], group), [len(part) for part in mine]
