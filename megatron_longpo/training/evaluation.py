"""The metrics of given documents under the weights as they are."""

from __future__ import annotations

import torch

from megatron_longpo.config import RunConfig
from megatron_longpo.training.data import MicroBatches, evaluation_batches
from megatron_longpo.training.step import StepMetrics, run_global_batch


def evaluate(
    config: RunConfig, chunks: list[torch.nn.Module], micro_batches: MicroBatches, numbers: list[int]
) -> StepMetrics:
    """Mean of every metric over documents, each counted once; forward only, the same on every rank.

    Collectives: those of forward passes, and of `global_batch_metrics` per group of ``--global-batch-size`` documents.

    Args:
        config: The run.
        chunks: This rank's model chunks, their weights complete.
        micro_batches: Where the documents come from.
        numbers: The documents, by their numbers in the dataset.
    """
    totals: StepMetrics = {}
    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        for group, counted in evaluation_batches(micro_batches, numbers):
            means, _ = run_global_batch(config, chunks, group, True, len(numbers), counted)
            totals = {name: totals.get(name, 0.0) + value for name, value in means.items()}
    for chunk in chunks:
        chunk.train()
    return totals
