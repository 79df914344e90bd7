"""``pretrain_longpo.py --dry-run``: the memory of exactly the given flags, or the errors that training would give."""

from __future__ import annotations

import dataclasses

from megatron_longpo import platform
from megatron_longpo.config import ConfigError, RunConfig
from megatron_longpo.data.dataset import PreferenceDataset
from megatron_longpo.data.rows import TrainingRow
from megatron_longpo.planning.hardware import GPU, gpu_named, usable_gib
from megatron_longpo.planning.parallel_dry_runs import dry_runs
from megatron_longpo.planning.step_time import StepTime, step_time
from megatron_longpo.planning.tables import layout_line, memory_table, rows_line, time_line
from megatron_longpo.planning.workload import longest_rows, made_up_rows, num_predictions, work_of
from megatron_longpo.training.distributed import is_rank_0, world_size
from megatron_longpo.training.initial import with_initial_model
from megatron_longpo.validation import validate

NO_DATA = "PREFIX"
"""Stands for ``--data-path`` where none is given."""


def print_dry_run(config: RunConfig) -> None:
    """Print the peak memory of a run by part, with ``--gpu`` the predicted time too; on rank 0 only.

    Raises:
        ConfigError: Whatever training would refuse.
        ValueError: With ``--gpu``: the run needs more memory than that GPU has.
    """
    if not is_rank_0():
        return
    gpu = None if config.planning.gpu is None else gpu_named(config.planning.gpu)
    if gpu is not None:
        gpu.refuse_backend(config.training.attention_backend)
    num_gpus = config.planning.num_gpus or world_size()
    config, rows = resolved(config, num_gpus)
    print(layout_line(config, num_gpus))
    print(rows_line(rows, made_up=config.data.data_path == NO_DATA), flush=True)
    if config.window_note is not None:
        print(config.window_note)
    stages = dry_runs([(config, num_gpus)], rows)[0]
    print("\n" + memory_table(stages, gpu))
    if gpu is not None:
        print(time_line(predicted(config, num_gpus, rows, gpu)))
    needed = max(stage.gib for stage in stages)
    if gpu is not None and needed > usable_gib(gpu):
        raise ValueError(
            f"the run needs {needed:.2f} GiB and {gpu.name} has {usable_gib(gpu):.2f} GiB for tensors: spread it over "
            "more GPUs, add --recompute-granularity full, or let tools/plan_run.py choose"
        )


def predicted(config: RunConfig, num_gpus: int, rows: list[TrainingRow], gpu: GPU) -> StepTime:
    """The time of one step of these micro-batches."""
    return step_time(config, num_gpus, work_of(config, rows, num_predictions(config, rows)), gpu)


def resolved(config: RunConfig, num_gpus: int) -> tuple[RunConfig, list[TrainingRow]]:
    """The run as training would start it on this many GPUs, and its longest micro-batch."""
    on_cpu = config.training.use_cpu
    platform.prepare(use_cpu=True)
    dataset = PreferenceDataset(config.data.data_path) if config.data.data_path else None
    config = with_initial_model(config)
    if not config.model.vocab_size:
        if dataset is None:
            raise ConfigError("--vocab-size is required without --data-path: the dataset's tokenizer would give it")
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=dataset.vocab_size))
    if dataset is None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, data_path=NO_DATA))
    config = config.with_device_defaults("local", "gloo" if on_cpu else "nccl")
    validate(config, num_gpus)
    return config, made_up_rows(config) if dataset is None else longest_rows(config, dataset)
