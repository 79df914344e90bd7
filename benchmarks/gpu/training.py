"""Speed of the trainer's own step on one long document with random weights, against what the device reaches."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.step.case import DATASET, ReferenceNumbers, StepCase, write_document
from benchmarks.step.trainer import LONGPO, run_config, shared_prefix_batch
from megatron_longpo import platform
from megatron_longpo.config import RunConfig
from megatron_longpo.data.dataset import PreferenceDataset
from megatron_longpo.data.rows import OBJECTIVE_ROLES
from megatron_longpo.model.flops import attention_flops, step_flops
from megatron_longpo.planning.hardware import GPU
from megatron_longpo.planning.step_time import step_time
from megatron_longpo.planning.workload import Work
from megatron_longpo.training.data import GlobalBatch
from megatron_longpo.training.distributed import initialize, shut_down
from megatron_longpo.training.loop import Trainer
from megatron_longpo.validation import validate

_MOST_STEPS = 3
_ENOUGH_S = 15.0
"""No further step is timed after so long."""
_NEW_LENGTHS = 12
_WARM_UP_TOKENS = 4096
"""Document of the step before: it loads kernels and plans products, which does not take minutes of 256K tokens."""


def speed(case: StepCase, flags: Sequence[str], folder: Path, backend: str) -> dict[str, Any]:
    """Times and rates of one document length: the fastest of up to three steps, after a short one.

    Args:
        case: Shape and document.
        flags: Of the trainer.
        folder: For the dataset.
        backend: The attention kernel, a value of ``--attention-backend``.

    Returns:
        Tokens are those of the row; ``attention_flops`` and ``matmul_flops`` are model FLOPs of a step.
    """
    warm_up = dataclasses.replace(case, prefix_tokens=min(case.prefix_tokens, _WARM_UP_TOKENS))
    config, dataset = _prepared(case, [*flags, *_backend_flags(case, backend)], folder, warm_up)
    measured = _steps(config, dataset, case, _MOST_STEPS, warm_up)
    work = _work(config, dataset, case)
    attention = 3 * attention_flops(config.model, work.layout)
    return {
        **measured,
        "row_tokens": work.layout.num_tokens,
        "tokens_per_s": work.layout.num_tokens / measured["step_s"],
        "matmul_flops": step_flops(config.model, work.layout, work.num_predictions) - attention,
        "attention_flops": attention,
    }


def new_lengths(case: StepCase, flags: Sequence[str], folder: Path, backend: str) -> dict[str, Any]:
    """Times of steps on documents whose lengths are all new, and of the same steps when they are not.

    Kernels that are prepared for every new shape, allocations of new sizes and the like make the difference: datasets
    have thousands of lengths. Documents are as long as the case's, which comes first, or up to a quarter shorter.
    """
    generator = random.Random(case.seed)
    shortest = case.prefix_tokens * 3 // 4
    chosen = generator.sample(range(shortest, case.prefix_tokens), min(_NEW_LENGTHS, case.prefix_tokens - shortest))
    documents = [dataclasses.replace(case, prefix_tokens=length) for length in chosen]
    config, dataset = _prepared(case, [*flags, *_backend_flags(case, backend)], folder, *documents)
    initialize(config)
    try:
        trainer = Trainer(config, dataset)
        _step(trainer, case, number=0)
        before = psutil.Process().memory_info().rss
        passes = [
            [_step(trainer, each, number)["iteration_time_s"] for number, each in enumerate(documents, 1)]
            for _ in range(2)
        ]
    finally:
        shut_down()
    new_s, seen_s = map(sum, passes)
    return {
        "prefix_tokens": chosen,
        "new_s": passes[0],
        "seen_s": passes[1],
        "new_over_seen": new_s / seen_s,
        "host_gib": (psutil.Process().memory_info().rss - before) / 2**30,
    }


def predicted_seconds(case: StepCase, flags: Sequence[str], folder: Path, backend: str, gpu: GPU) -> float:
    """What the planner says of the time of `speed` with the same arguments, with the rates of its table."""
    config, dataset = _prepared(case, [*flags, *_backend_flags(case, backend)], folder)
    return step_time(config, 1, _work(config, dataset, case), gpu).seconds


def _work(config: RunConfig, dataset: PreferenceDataset, case: StepCase) -> Work:
    batch = shared_prefix_batch(config, dataset, ReferenceNumbers(case))
    return Work(batch.layout, len(batch.predictions.targets))


def longest_step(
    case: StepCase, flags: Sequence[str], folder: Path, backend: str, window_tokens: int
) -> dict[str, Any]:
    """Time and memory of one step with a sliding window: the activations of full attention, in a fraction of the time.

    Only the kernels' workspace is smaller than without a window.
    """
    window = f"--window-size={window_tokens},0"
    config, dataset = _prepared(case, [*flags, *_backend_flags(case, backend), window], folder)
    return _steps(config, dataset, case, 1, None)


def _backend_flags(case: StepCase, backend: str) -> list[str]:
    return [f"--attention-backend={backend}"] if case.bf16 else []


def _steps(
    config: RunConfig, dataset: PreferenceDataset, case: StepCase, most_steps: int, warm_up: StepCase | None
) -> dict[str, Any]:
    initialize(config)
    try:
        trainer = Trainer(config, dataset)
        if warm_up is not None:
            _step(trainer, warm_up, number=1)
        steps: list[dict[str, float]] = []
        while len(steps) < most_steps and sum(step["iteration_time_s"] for step in steps) < _ENOUGH_S:
            steps.append(_step(trainer, case, number=0))
    finally:
        shut_down()
    fastest = min(steps, key=lambda step: step["iteration_time_s"])
    return {
        "prefix_tokens": case.prefix_tokens,
        "step_s": fastest["iteration_time_s"],
        "forward_backward_s": fastest["forward_backward_time_s"],
        "steps_s": [step["iteration_time_s"] for step in steps],
        "peak_memory_gib": platform.peak_memory_gib(),
        "pinned_memory_gib": platform.peak_pinned_memory_gib(),
        "loss": steps[0]["loss"],
    }


def _step(trainer: Trainer, case: StepCase, number: int) -> dict[str, float]:
    batch = shared_prefix_batch(trainer.config, trainer.dataset, ReferenceNumbers(case), number)
    metrics, bad = trainer._step(GlobalBatch([batch], [number]))
    assert bad is None, "a loss or gradient was not finite"
    return metrics


def predicted_memory(case: StepCase, flags: Sequence[str], folder: Path) -> dict[str, float]:
    """What a dry run says of the memory of `speed` with the same arguments; it needs no GPU and leaves it alone."""
    os.environ["LONGPO_USE_CPU"] = "1"
    from megatron_longpo.planning.dry_run import dry_run

    config, dataset = _prepared(case, flags, folder)
    (rank,) = dry_run(config, 1, [dataset.row(0, "joint", OBJECTIVE_ROLES[config.objective.objective])])
    return {"peak_memory_gib": rank.gib}


def _prepared(
    case: StepCase, flags: Sequence[str], folder: Path, *more: StepCase
) -> tuple[RunConfig, PreferenceDataset]:
    """Random documents in a dataset, and the run that trains on them."""
    write_document(case, folder, *more)
    config = _config(case, flags, folder)
    return config, PreferenceDataset(folder / DATASET)


def _config(case: StepCase, more_flags: Sequence[str], folder: Path) -> RunConfig:
    flags = [
        *LONGPO,
        *more_flags,
        *(f"--num-layers={case.num_layers}", f"--hidden-size={case.hidden_size}"),
        *(f"--ffn-hidden-size={case.ffn_hidden_size}", f"--num-attention-heads={case.num_attention_heads}"),
        *("--group-query-attention", f"--num-query-groups={case.num_query_groups}", f"--vocab-size={case.vocab_size}"),
        *("--swiglu", "--disable-bias-linear", "--untie-embeddings-and-output-weights"),
        *(f"--max-position-embeddings={case.prefix_tokens + case.branch_tokens}", "--rotary-base=1e7"),
    ]
    config = run_config(case, folder, flags, 1 + _MOST_STEPS)
    validate(config, 1)
    return config
