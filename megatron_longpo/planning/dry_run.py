"""Peak memory of a run without its machine: real steps of its first and last pipeline stage, on fake tensors.

Nothing is estimated: model, data parallelism, schedule, attention, LM head, loss and optimizer are those of the run, at
its world size. The idea is that of torchtitan's memory estimation and of ``torch.distributed._tools``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_longpo.config import RunConfig
from megatron_longpo.data.batch import Batch
from megatron_longpo.data.rows import TrainingRow
from megatron_longpo.planning.fake_calls import FakeCalls
from megatron_longpo.planning.fake_world import fake_tensors, fake_world
from megatron_longpo.planning.ledger import MemoryLedger
from megatron_longpo.planning.measured_step import MeasuredTrainer
from megatron_longpo.planning.on_gpu import as_on_gpu, hidden_bytes
from megatron_longpo.planning.parts import Part
from megatron_longpo.planning.workload import batch_of
from megatron_longpo.training.fused_adam import fuse_adam


@dataclass(frozen=True)
class RankMemory:
    """Memory of one rank at its peak within a step.

    Args:
        stage: Pipeline stage of the rank.
        parts: Bytes by part, at the moment of the peak.
        own_peaks: The most bytes of each part, at whatever moment of the step.
        host: Bytes of host memory by part, at the moment of their peak; all zero unless something is offloaded.
    """

    stage: int
    parts: dict[Part, int]
    own_peaks: dict[Part, int]
    host: dict[Part, int]

    @property
    def gib(self) -> float:
        """All parts together, GiB."""
        return sum(self.parts.values()) / 2**30

    @property
    def host_gib(self) -> float:
        """Host memory, GiB."""
        return sum(self.host.values()) / 2**30


def dry_run(config: RunConfig, world_size: int, rows: Sequence[TrainingRow]) -> list[RankMemory]:
    """The peaks of the first and of the last pipeline stage, whose ranks hold most (one entry without pipeline).

    The first stage holds activations of most micro-batches at a time, the last one the LM head. Within a stage it is
    the first rank: others hold the same but for a few tiles of attention and predictions of their own part of the row.
    With a ring, the last context-parallel rank's workspace of attention is larger by about a quarter of its queries.

    Args:
        config: A validated run.
        world_size: Ranks.
        rows: The micro-batch; that of `workload.longest_rows` or `workload.made_up_rows`.
    """
    return [dry_run_stage(config, world_size, stage, rows) for stage in measured_stages(config)]


def measured_stages(config: RunConfig) -> list[int]:
    """The first and the last pipeline stage."""
    return sorted({0, config.parallel.pipeline_model_parallel_size - 1})


def num_measured_microbatches(config: RunConfig, world_size: int, stage: int) -> int:
    """Micro-batches after which a stage's memory repeats itself, so that more of them need not be run.

    The second micro-batch finds what the first one left behind, and on the last stage of 1F1B each one is finished
    before the next. On the first, as many are under way as there are stages (Narayanan et al. 2021, section 2.2);
    interleaved, twice as many fill the warm-up.
    """
    total, stages = config.num_microbatches(world_size), config.parallel.pipeline_model_parallel_size
    if config.parallel.num_layers_per_virtual_pipeline_stage is not None:
        return min(total, 2 * stages)
    return min(total, 2 if stage == stages - 1 else stages + 1)


def dry_run_stage(config: RunConfig, world_size: int, stage: int, rows: Sequence[TrainingRow]) -> RankMemory:
    """`dry_run` of one pipeline stage."""
    on_gpu = not config.training.use_cpu
    num_micro_batches = num_measured_microbatches(config, world_size, stage)
    config = _for_fake_world(config)
    # Megatron counts through a stage's tensor, context and data parallel ranks before it comes to the next stage.
    rank = stage * world_size // config.parallel.pipeline_model_parallel_size
    with fake_world(config, rank, world_size):
        batch = batch_of(config, rows, parallel_state.get_context_parallel_rank())
        with fake_tensors(batch.layout) as mode, ExitStack() as stack:
            ledger = MemoryLedger(FakeCalls(mode), hidden_bytes if on_gpu else None)
            stack.enter_context(as_on_gpu(on_gpu, ledger))
            stack.enter_context(ledger)
            # Lengths travel between stages as numbers, which fake tensors lack: every row here has the same.
            data = dataclasses.replace(config.data, seq_length=batch.layout.padded_tokens)
            trainer = MeasuredTrainer(dataclasses.replace(config, data=data), ledger)
            for chunk in trainer.chunks:
                chunk.config.variable_seq_lengths = False
            if on_gpu:
                fuse_adam(trainer.optimizer)
            trainer.allocate_optimizer_state()
            trainer.measure([fake_batch(batch, mode)] * num_micro_batches)
    return RankMemory(stage, ledger.device.peak, ledger.device.own_peaks, ledger.host.peak)


def _for_fake_world(config: RunConfig) -> RunConfig:
    training = dataclasses.replace(config.training, use_cpu=True, transformer_impl="local")
    parallel = dataclasses.replace(config.parallel, distributed_backend="gloo")
    return dataclasses.replace(config, training=training, parallel=parallel)


def fake_batch(batch: Batch, mode: FakeTensorMode) -> Batch:
    """A batch with fake tensors in place of real ones."""

    def converted(holder: Any) -> dict[str, Any]:
        fields = {field.name: getattr(holder, field.name) for field in dataclasses.fields(holder)}
        return {name: mode.from_tensor(value) for name, value in fields.items() if isinstance(value, torch.Tensor)}

    predictions = dataclasses.replace(batch.predictions, **converted(batch.predictions))
    return dataclasses.replace(batch, predictions=predictions, **converted(batch))
