"""The trainer's own optimizer step on a shared-prefix row, and on the same two conversations as full sequences."""

# T=tokens of the row H=hidden_size V=vocabulary K=predictions D=documents

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import MethodType

import torch

from benchmarks.step.case import DATASET, WEIGHTS, ReferenceNumbers, StepCase
from benchmarks.step.clock import StepClock
from megatron_longpo import platform
from megatron_longpo.arguments import parse_arguments
from megatron_longpo.config import RunConfig
from megatron_longpo.data.batch import Batch, collate
from megatron_longpo.data.dataset import PreferenceDataset
from megatron_longpo.data.document import CHOSEN, REJECTED
from megatron_longpo.data.layout import DocumentLayout, RowLayout
from megatron_longpo.data.rows import OBJECTIVE_ROLES
from megatron_longpo.model.build import unwrap
from megatron_longpo.model.gpt import LogprobHead
from megatron_longpo.training.data import GlobalBatch
from megatron_longpo.training.distributed import initialize, shut_down
from megatron_longpo.training.initial import with_initial_model
from megatron_longpo.training.loop import Trainer

LONGPO = ["--objective=longpo"]
DPO_ALONE = ["--objective=dpo", "--lambda=1", "--nll-weight=0"]
"""Only the preference loss, so only the answers' logits: what TRL's DPO trainer computes."""


def run_shared_prefix(case: StepCase, folder: Path, num_steps: int, clock: StepClock) -> list[float]:
    """LongPO on the row ``[prefix | chosen | rejected]``; returns the loss of every step."""
    return _run(case, folder, LONGPO, num_steps, clock)


def run_shared_prefix_dpo(case: StepCase, folder: Path, num_steps: int, clock: StepClock) -> list[float]:
    """The same row with the preference loss alone."""
    return _run(case, folder, DPO_ALONE, num_steps, clock)


def run_two_sequences(case: StepCase, folder: Path, num_steps: int, clock: StepClock) -> list[float]:
    """LongPO on both conversations in full, as a trainer does that shares nothing; all else is the same code."""
    return _run(case, folder, LONGPO, num_steps, clock, shared=False)


def run_two_sequences_full_logits(case: StepCase, folder: Path, num_steps: int, clock: StepClock) -> list[float]:
    """`run_two_sequences` with the logits of all tokens in memory at once."""
    return _run(case, folder, LONGPO, num_steps, clock, shared=False, full_logits=True)


def _run(
    case: StepCase,
    folder: Path,
    objective: list[str],
    num_steps: int,
    clock: StepClock,
    shared: bool = True,
    full_logits: bool = False,
) -> list[float]:
    config = run_config(case, folder, [*objective, f"--load-hf={folder / WEIGHTS}"], num_steps)
    dataset = PreferenceDataset(folder / DATASET)
    initialize(config)
    try:
        trainer = Trainer(config, dataset)
        if full_logits:
            head = unwrap(trainer.chunks[0]).output_layer
            head.forward = MethodType(_full_logits_forward, head)
        make = shared_prefix_batch if shared else two_sequences_batch
        batch = make(config, dataset, ReferenceNumbers(case))
        losses = []
        for _ in range(num_steps):
            with clock.step():
                metrics, skipped = trainer._step(GlobalBatch([batch], [0]))
            assert skipped is None, "a loss or gradient was not finite"
            losses.append(metrics["loss"])
        return losses
    finally:
        shut_down()


def run_config(case: StepCase, folder: Path, flags: Sequence[str], num_steps: int) -> RunConfig:
    """The trainer's configuration of a case; the flags give objective and model, and more if wanted."""
    words = [
        *flags,
        f"--data-path={folder / DATASET}",
        f"--seq-length={case.prefix_tokens + case.branch_tokens}",
        f"--train-iters={num_steps}",
        "--global-batch-size=1",
        "--split=100,0",
        "--lr-decay-style=constant",
        "--lr-warmup-fraction=0",
        "--num-workers=0",
        "--progress-bar=off",
        *(["--bf16"] if case.bf16 else []),
        *(["--use-cpu"] if case.device == "cpu" else []),
    ]
    config = with_initial_model(parse_arguments(words))
    platform.prepare(config.training.use_cpu)
    return config.with_device_defaults(*platform.device_defaults())


def shared_prefix_batch(
    config: RunConfig, dataset: PreferenceDataset, reference: ReferenceNumbers, number: int = 0
) -> Batch:
    """A document as training reads it."""
    roles = OBJECTIVE_ROLES[config.objective.objective]
    return collate([dataset.row(number, "joint", roles)], objective=config.objective, reference=reference)


def two_sequences_batch(config: RunConfig, dataset: PreferenceDataset, reference: ReferenceNumbers) -> Batch:
    """Document 0 as two plain causal sequences in one row: the same predictions, from more tokens.

    Both are in one forward and backward pass, as in the concatenated batch of trainers that share no prefix, since the
    preference loss needs both before it has a gradient.
    """
    rows = [dataset.row(0, "joint", (role,)) for role in (CHOSEN, REJECTED)]
    batch = collate(rows, objective=config.objective, reference=reference)
    # One sequence is one causal square, without a seam between document and answer.
    plain = RowLayout(tuple(DocumentLayout(row.num_tokens, ()) for row in rows))
    predictions = batch.predictions
    slots = 2 * predictions.max_turns
    paired = replace(
        predictions,
        # The answers of two documents become those of one comparison.
        document_index=torch.zeros_like(predictions.document_index),
        response_slot=torch.where(predictions.response_slot < 0, -1, predictions.response_slot % slots),
        num_documents=1,
        turn_mask=predictions.turn_mask[:1],
    )
    first = slice(1)
    return replace(
        batch, layout=plain, predictions=paired, sample_ids=batch.sample_ids[first], numbers=batch.numbers[first]
    )


def _full_logits_forward(
    head: LogprobHead,
    hidden: torch.Tensor,
    source_index: torch.Tensor,
    targets: torch.Tensor,
    *,
    weight: torch.Tensor | None,
    vocab_size: int,
    chunk_tokens: int,
) -> torch.Tensor:
    """`LogprobHead.forward` by way of the logits ``[T, V]`` and their log-softmax, in fp32."""
    logits = hidden.squeeze(1) @ head.weight.t()
    return logits[:, :vocab_size].float().log_softmax(dim=-1)[source_index, targets]
