"""The longest row that a run will compute, from its dataset or from its flags, and that row as a batch."""

# P=prefix tokens C=tokens of a branch K=predictions

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_longpo.config import ConfigError, ParallelConfig, RunConfig
from megatron_longpo.data.batch import Batch, collate
from megatron_longpo.data.dataset import PreferenceDataset
from megatron_longpo.data.document import CHOSEN
from megatron_longpo.data.layout import RowLayout
from megatron_longpo.data.predictions import ReferenceTurns
from megatron_longpo.data.rows import OBJECTIVE_ROLES, RowBranch, TrainingRow

INSTRUCTION_TOKENS = 64
"""An instruction with its chat template, in conversations that are made up."""

TURNS_PER_DOCUMENT = 4
"""The paper's highest number of turns."""

RESPONSE_TOKENS = 512


@dataclass(frozen=True)
class Work:
    """What one micro-batch asks for.

    Args:
        layout: The row.
        num_predictions: Next-token predictions over all ranks.
    """

    layout: RowLayout
    num_predictions: int


def longest_rows(config: RunConfig, dataset: PreferenceDataset) -> list[TrainingRow]:
    """The micro-batch of the dataset's longest rows."""
    lengths = dataset.row_tokens(config.objective.turns)
    numbers = np.argsort(lengths)[::-1][: config.training.micro_batch_size]
    roles = OBJECTIVE_ROLES[config.objective.objective]
    return [dataset.row(int(number), config.objective.turns, roles) for number in numbers]


def made_up_rows(
    config: RunConfig, num_turns: int = TURNS_PER_DOCUMENT, response_tokens: int = RESPONSE_TOKENS
) -> list[TrainingRow]:
    """A micro-batch whose conversations are exactly ``--seq-length`` tokens long.

    Raises:
        ConfigError: The answers leave no room for a document.
    """
    joint = config.objective.turns == "joint"
    turns_of_branch = num_turns if joint else 1
    branch_tokens = turns_of_branch * (INSTRUCTION_TOKENS + response_tokens) - INSTRUCTION_TOKENS * joint
    prefix_tokens = config.data.seq_length - branch_tokens
    if prefix_tokens < 1:
        raise ConfigError(
            f"--seq-length {config.data.seq_length} has no room for a document beside {turns_of_branch} answers of "
            f"{response_tokens} tokens: lower --response-tokens or --turns-per-document"
        )
    branches = []
    for first_turn in range(1 if joint else num_turns):
        for role in OBJECTIVE_ROLES[config.objective.objective]:
            spans, start = [], 0 if joint else INSTRUCTION_TOKENS
            for turn in range(turns_of_branch):
                spans.append((first_turn + turn, start, start + response_tokens))
                start += response_tokens + INSTRUCTION_TOKENS
            branches.append(RowBranch(role, np.zeros(branch_tokens, np.int32), tuple(spans)))
    row = TrainingRow("longest", 0, np.zeros(prefix_tokens, np.int32), tuple(branches), num_turns)
    return [row] * config.training.micro_batch_size


def batch_of(config: RunConfig, rows: Sequence[TrainingRow], cp_rank: int = 0) -> Batch:
    """The batch of one context-parallel rank, as training collates it; its reference log-probs are zero."""
    return collate(
        rows,
        objective=config.objective,
        cp_size=config.parallel.context_parallel_size,
        cp_rank=cp_rank,
        row_multiple=config.row_multiple,
        max_sequence_tokens=config.data.seq_length,
        reference=_NoReference(rows),
    )


def num_predictions(config: RunConfig, rows: Sequence[TrainingRow]) -> int:
    """Next-token predictions that the objective asks for in a micro-batch, over all ranks."""
    whole = dataclasses.replace(config, parallel=ParallelConfig())
    return len(batch_of(whole, rows).predictions.targets)


def work_of(config: RunConfig, rows: Sequence[TrainingRow], predictions: int) -> Work:
    """A micro-batch laid out for a run's ranks."""
    parallel = config.parallel
    documents = tuple(row.layout for row in rows)
    return Work(RowLayout(documents, parallel.context_parallel_size, config.row_multiple), predictions)


class _NoReference:
    """Reference log-probs of the right lengths; memory does not depend on their values."""

    def __init__(self, rows: Sequence[TrainingRow]) -> None:
        self._turns = {row.number: _zeros(row) for row in rows}

    def of(self, number: int) -> ReferenceTurns:
        """Zeros for every token of the document's answers."""
        return self._turns[number]


def _zeros(row: TrainingRow) -> ReferenceTurns:
    turns: list[list[NDArray[np.float32]]] = [[np.zeros(1, np.float32)] * 2 for _ in range(row.num_turns)]
    for branch in row.branches:
        for turn, start, stop in branch.spans:
            turns[turn][0 if branch.role == CHOSEN else 1] = np.zeros(stop - start, np.float32)
    return [(chosen, rejected) for chosen, rejected in turns]
