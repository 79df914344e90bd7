"""Speed of the trainer's own step on one long document with random weights, against what the device reaches."""

from __future__ import annotations

import dataclasses
import os
import statistics
from pathlib import Path

from benchmarks.gpu.settings import Model
from benchmarks.step.case import DATASET, ReferenceNumbers, StepCase, write_document
from benchmarks.step.trainer import LONGPO, shared_prefix_batch
from megatron_longpo import platform
from megatron_longpo.arguments import parse_arguments
from megatron_longpo.config import RunConfig
from megatron_longpo.config.training import FLASH
from megatron_longpo.data.dataset import PreferenceDataset
from megatron_longpo.data.rows import OBJECTIVE_ROLES
from megatron_longpo.model.flops import attended_pairs, step_flops
from megatron_longpo.training.data import GlobalBatch
from megatron_longpo.training.distributed import initialize, shut_down
from megatron_longpo.training.loop import Trainer
from megatron_longpo.validation import validate


def speed(model: Model, prefix_tokens: int, num_steps: int, folder: Path, backend: str = FLASH) -> dict[str, float]:
    """Times and rates of one document length.

    Args:
        model: Shape and flags.
        prefix_tokens: Tokens of the document.
        num_steps: Steps, of which the first is a warm-up.
        folder: For the dataset.
        backend: The attention kernel, a value of ``--attention-backend``.

    Returns:
        Tokens are those of the row; ``attention_flops`` and ``matmul_flops`` are model FLOPs of a step.
    """
    if model.case.bf16 and backend != FLASH:
        model = dataclasses.replace(model, flags=(*model.flags, f"--attention-backend={backend}"))
    case, config, dataset = _prepared(model, prefix_tokens, num_steps, folder)
    initialize(config)
    try:
        trainer = Trainer(config, dataset)
        batch = shared_prefix_batch(config, dataset, ReferenceNumbers(case))
        steps = [trainer._step(GlobalBatch([batch], [0]))[0] for _ in range(num_steps)]
    finally:
        shut_down()
    measured = steps[1:] or steps
    seconds = statistics.median(step["iteration_time_s"] for step in measured)
    shape = config.model
    flops = step_flops(shape, batch.layout, len(batch.predictions.targets))
    attention = 12.0 * shape.num_layers * shape.num_attention_heads * shape.kv_channels * attended_pairs(batch.layout)
    return {
        "prefix_tokens": prefix_tokens,
        "row_tokens": batch.num_tokens,
        "step_s": seconds,
        "forward_backward_s": statistics.median(step["forward_backward_time_s"] for step in measured),
        "tokens_per_s": batch.num_tokens / seconds,
        "matmul_flops": flops - attention,
        "attention_flops": attention,
        "peak_memory_gib": platform.peak_memory_gib(),
        "loss": measured[-1]["loss"],
    }


def predicted_memory(model: Model, prefix_tokens: int, folder: Path) -> dict[str, float]:
    """What a dry run says of the memory of `speed` with the same arguments; it needs no GPU and leaves it alone."""
    os.environ["LONGPO_USE_CPU"] = "1"
    from megatron_longpo.planning.dry_run import dry_run

    _, config, dataset = _prepared(model, prefix_tokens, 1, folder)
    (rank,) = dry_run(config, 1, [dataset.row(0, "joint", OBJECTIVE_ROLES[config.objective.objective])])
    return {"peak_memory_gib": rank.gib}


def _prepared(
    model: Model, prefix_tokens: int, num_steps: int, folder: Path
) -> tuple[StepCase, RunConfig, PreferenceDataset]:
    """One random document in a dataset, and the run that trains on it."""
    case = dataclasses.replace(model.case, prefix_tokens=prefix_tokens)
    write_document(case, folder)
    config = _config(model, case.prefix_tokens + case.branch_tokens, folder, num_steps)
    return case, config, PreferenceDataset(folder / DATASET)


def _config(model: Model, num_tokens: int, folder: Path, num_steps: int) -> RunConfig:
    case = model.case
    flags = [
        *LONGPO,
        *model.flags,
        *(f"--num-layers={case.num_layers}", f"--hidden-size={case.hidden_size}"),
        *(f"--ffn-hidden-size={case.ffn_hidden_size}", f"--num-attention-heads={case.num_attention_heads}"),
        *("--group-query-attention", f"--num-query-groups={case.num_query_groups}", f"--vocab-size={case.vocab_size}"),
        *("--swiglu", "--disable-bias-linear", "--untie-embeddings-and-output-weights"),
        *(f"--seq-length={num_tokens}", f"--max-position-embeddings={num_tokens}", "--rotary-base=1e7"),
        f"--data-path={folder / DATASET}",
        *(f"--train-iters={num_steps}", "--global-batch-size=1", "--split=100,0", "--num-workers=0"),
        *("--lr-decay-style=constant", "--lr-warmup-fraction=0", "--progress-bar=off"),
        *(["--bf16"] if case.bf16 else []),
        *(["--use-cpu"] if case.device == "cpu" else []),
    ]
    config = parse_arguments(flags)
    platform.prepare(config.training.use_cpu)
    config = config.with_device_defaults(platform.default_transformer_impl(), platform.default_backend())
    validate(config, 1)
    return config
