"""One training step of this package: on a shared-prefix row, and on the same two conversations one after the other.

All variants run the trainer's own parts: model, schedule, loss, gradient buffers, clipping, Adam.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from megatron.core.distributed import finalize_model_grads

from benchmarks.problem import Problem
from megatron_longpo import platform
from megatron_longpo.arguments import parse_arguments
from megatron_longpo.config import RunConfig
from megatron_longpo.conversion.load import load_hf_weights
from megatron_longpo.data.batch import Batch, collate
from megatron_longpo.data.predictions import ReferenceTurns
from megatron_longpo.model import gpt
from megatron_longpo.model.build import build_model, wrap_for_training
from megatron_longpo.objective.dense import linear_logprobs_reference
from megatron_longpo.training.distributed import initialize
from megatron_longpo.training.initial import with_initial_model
from megatron_longpo.training.optimizer import build_optimizer
from megatron_longpo.training.step import document_loss, global_batch_metrics, run_schedule

Step = Callable[[], float]


@dataclasses.dataclass(frozen=True)
class Reference:
    """Reference log-probs as training finds them: on disk, so here simply numbers."""

    problem: Problem

    def of(self, number: int) -> ReferenceTurns:
        """The same for every turn and role."""
        logps = np.full(self.problem.response_tokens, -9.0, dtype=np.float32)
        return [(logps, logps)] * self.problem.turns


def shared_prefix(problem: Problem, model: Path) -> Step:
    """The document once, both branches behind it."""
    config = _config(problem, model)
    return _step(config, _collate(config, problem, two=False))


def two_sequences(problem: Problem, model: Path) -> Step:
    """The document twice, each time with one branch; same attention kernels, same LM head."""
    config = _config(problem, model)
    return _step(config, _collate(config, problem, two=True))


def two_sequences_full_logits(problem: Problem, model: Path) -> Step:
    """As `two_sequences`, with the logits of all predictions in memory at once, kept for the backward pass."""

    def full_logits(hidden, weight, source_index, targets, *, vocab_size, chunk_tokens, tp_group):  # type: ignore[no-untyped-def]
        return linear_logprobs_reference(hidden, weight, source_index, targets, vocab_size=vocab_size)

    gpt.linear_logprobs = full_logits  # type: ignore[assignment]
    return two_sequences(problem, model)


def _config(problem: Problem, model: Path) -> RunConfig:
    platform.prepare(use_cpu=True)
    length = str(problem.prefix_tokens + problem.branch_tokens)
    flags = ["--use-cpu", "--load-hf", str(model), "--data-path", "none", "--seq-length", length, "--lr", "1e-5"]
    config = with_initial_model(parse_arguments(flags))
    return config.with_device_defaults(platform.default_transformer_impl(), platform.default_backend())


def _collate(config: RunConfig, problem: Problem, two: bool) -> Batch:
    row = problem.row()
    rows = [row]
    if two:
        rows = [dataclasses.replace(row, branches=(branch,)) for branch in row.branches]
    batch = collate(rows, objective=config.objective, reference=Reference(problem))
    if not two:
        return batch
    # Two rows, yet one document: its margin needs the log-probs of both.
    predictions = batch.predictions
    per_row = predictions.max_turns * 2
    slots = predictions.response_slot
    one_document = dataclasses.replace(
        predictions,
        document_index=torch.zeros_like(predictions.document_index),
        response_slot=torch.where(slots < 0, slots, slots % per_row),
        num_documents=1,
        turn_mask=predictions.turn_mask[:1],
    )
    return dataclasses.replace(batch, predictions=one_document, sample_ids=batch.sample_ids[:1])


def _step(config: RunConfig, batch: Batch) -> Step:
    initialize(config)
    chunks = wrap_for_training(config, build_model(config))
    optimizer = build_optimizer(config, list(chunks))
    load_hf_weights(config, list(chunks), str(config.checkpoint.load_hf))
    optimizer.reload_model_params()
    settings = chunks[0].config
    settings.finalize_model_grads_func = finalize_model_grads
    settings.grad_scale_func = optimizer.scale_loss

    def step() -> float:
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        outputs = run_schedule(
            config, list(chunks), [batch], partial(document_loss, config.objective), forward_only=False
        )
        metrics, _ = global_batch_metrics(config, outputs, num_documents=1)
        optimizer.step()
        return metrics["loss"]

    return step
