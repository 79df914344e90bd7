"""One global batch through Megatron's pipeline schedules: training, evaluation, and forward-only log-probs."""

# K=predictions of a context-parallel rank D=documents of a micro-batch

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_longpo import platform
from megatron_longpo.config import ObjectiveConfig, RunConfig
from megatron_longpo.data.batch import Batch
from megatron_longpo.objective.losses import objective_loss
from megatron_longpo.ranges import DATA, LOSS, Stage, named_range
from megatron_longpo.training.data import GlobalBatch
from megatron_longpo.training.distributed import broadcast_from_last_stage

StepMetrics = dict[str, float]


def run_schedule(
    config: RunConfig,
    chunks: list[torch.nn.Module],
    batches: list[Batch],
    loss_function: Any,
    forward_only: bool,
) -> list[Any]:
    """Run micro-batches through the schedule that the layout asks for (none, 1F1B or interleaved).

    Args:
        config: The run.
        chunks: This rank's model chunks.
        batches: One per micro-batch, on the CPU.
        loss_function: Called as ``loss_function(batch, logps [K])`` on the last stage, returns Megatron's triple
            (loss, count, anything).
        forward_only: No gradients.

    Returns:
        The third members of the triples, one per micro-batch, on the last pipeline stage; empty elsewhere.
    """

    def forward_step(iterator: Iterator[Batch], model: torch.nn.Module) -> Any:
        """This stage's part of one micro-batch, and what makes its loss of the result."""
        with named_range(DATA):
            batch = next(iterator).to(platform.device())
        logps = model(
            batch.tokens[None],
            batch.position_ids[None],
            batch.layout.to_tensor(),
            batch.predictions.source_index,
            batch.predictions.targets,
        )
        return logps, partial(loss_function, batch)

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(batches) for _ in chunks],
        model=chunks,
        num_microbatches=len(batches),
        seq_length=config.data.seq_length,  # only a hint: lengths travel with the tensors
        micro_batch_size=1,
        forward_only=forward_only,
    )


def run_global_batch(
    config: RunConfig,
    chunks: list[torch.nn.Module],
    batch: GlobalBatch,
    forward_only: bool,
    num_documents: int | None = None,
    counted: list[int] | None = None,
) -> tuple[StepMetrics, list[str]]:
    """A global batch under the run's objective: what `global_batch_metrics` says of it, and its gradients.

    Collectives: those of the schedule, and of `global_batch_metrics`.

    Args:
        config: The run.
        chunks: This rank's model chunks.
        batch: The global batch; without ``forward_only`` its gradients are left in the chunks' gradient buffers.
        forward_only: No gradients.
        num_documents: Documents to average over; None is those of the batch.
        counted: As of `global_batch_metrics`.
    """
    outputs = run_schedule(
        config, chunks, batch.micro_batches, lambda b, logps: document_loss(config.objective, b, logps), forward_only
    )
    return global_batch_metrics(config, outputs, num_documents or len(batch.numbers), counted)


def document_loss(objective: ObjectiveConfig, batch: Batch, logps: torch.Tensor) -> tuple[Any, Any, Any]:
    """Megatron's loss triple of one micro-batch: summed loss, number of documents, per-document metrics.

    The count is given by one context-parallel rank only, since Megatron sums it over data- and context-parallel ranks
    and divides the summed gradients by it: the mean over the documents of the global batch, for every layout.
    """
    group = parallel_state.get_context_parallel_group()
    stage = Stage(LOSS)
    logps = stage.enter(logps)
    losses, metrics = objective_loss(objective, logps, batch.predictions, cp_group=group if group.size() > 1 else None)
    losses = stage.leave(losses)
    count = losses.new_full((), len(losses) if group.rank() == 0 else 0, dtype=torch.int)
    named = {"loss": losses.detach()} | metrics
    return losses.sum(), count, {"ids": batch.sample_ids, "metrics": named}


def global_batch_metrics(
    config: RunConfig, outputs: list[Any], num_documents: int, counted: list[int] | None = None
) -> tuple[StepMetrics, list[str]]:
    """Mean of every metric over the documents of a global batch, the same on every rank.

    Collectives: 1 all-reduce over data-parallel ranks (last stage), 1 broadcast over the pipeline.

    Args:
        config: The run.
        outputs: What `run_schedule` returned here.
        num_documents: Documents of the global batch over all ranks.
        counted: How many documents of each micro-batch count, those at its front; None counts all.

    Returns:
        The means, and this rank's ids of documents whose loss is not finite.
    """
    names = metric_names(config.objective)
    sums = torch.zeros(len(names), dtype=torch.float64, device=platform.device())
    bad: list[str] = []
    for number, output in enumerate(outputs):
        table = torch.stack([output["metrics"][name].double() for name in names])
        sums += table[:, : counted[number] if counted else None].sum(dim=1)
        finite = torch.isfinite(output["metrics"]["loss"]).tolist()
        bad += [name for name, ok in zip(output["ids"], finite, strict=True) if not ok]
    if outputs:
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
    broadcast_from_last_stage(sums)
    return dict(zip(names, (sums / num_documents).tolist(), strict=True)), bad


def metric_names(objective: ObjectiveConfig) -> tuple[str, ...]:
    """The metrics that an objective defines, in the order in which they are written."""
    kind = objective.objective
    nll = ("longpo/nll_loss",) if objective.has_nll else ()
    if kind in ("longpo", "dpo"):
        return (
            "loss",
            "longpo/preference_loss",
            *nll,
            "rewards/chosen",
            "rewards/rejected",
            "rewards/accuracies",
            "rewards/margins",
            "logps/chosen",
            "logps/rejected",
        )
    side = ("logps/rejected",) if kind == "sft-rejected" else ("logps/chosen",)
    constraint = ("longpo/kl",) if kind == "sft-chosen-constraint" else ()
    return ("loss", *nll, *constraint, *side)


def gradients_are_finite(chunks: list[torch.nn.Module]) -> bool:
    """Whether every reduced gradient of this rank is finite; needs data-parallel wrapped chunks."""
    norms = [
        torch.linalg.vector_norm(buffer.grad_data)
        for chunk in chunks
        for buffer in chunk.buffers + chunk.expert_parallel_buffers  # type: ignore[operator]
    ]
    return bool(torch.isfinite(torch.stack(norms)).all())
