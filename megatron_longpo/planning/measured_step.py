"""The trainer's own step with a ledger watching: the same code for fake tensors and for real ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

from megatron_longpo.config import RunConfig
from megatron_longpo.data.batch import Batch
from megatron_longpo.model.build import build_model, wrap_for_training
from megatron_longpo.planning.ledger import MemoryLedger
from megatron_longpo.planning.parts import Part
from megatron_longpo.training.checkpoint import Progress
from megatron_longpo.training.data import GlobalBatch
from megatron_longpo.training.loop import Trainer
from megatron_longpo.training.optimizer import build_optimizer, build_scheduler
from megatron_longpo.training.profiling import StepProfiler

SCHEDULE_SAMPLES = 1_000_000
"""Length of the learning rate schedule; no number of a dry run depends on it."""


class MeasuredTrainer(Trainer):
    """A `Trainer` without dataset and checkpoints, whose memory is on a ledger from the first weight on.

    Args:
        config: A validated run.
        ledger: Entered by the caller.

    The process group and Megatron's parallel state must be up.
    """

    def __init__(self, config: RunConfig, ledger: MemoryLedger) -> None:
        self.config, self.ledger = config, ledger
        with ledger.everything_is(Part.WEIGHTS):
            self.chunks = wrap_for_training(config, build_model(config))
        for chunk in self.chunks:
            for buffer in chunk.buffers:
                ledger.move(buffer.grad_data, Part.GRADIENTS)
        with ledger.everything_is(Part.OPTIMIZER):
            self.optimizer = build_optimizer(config, self.chunks)
            self.scheduler = build_scheduler(config, self.optimizer, SCHEDULE_SAMPLES)
        self.progress = Progress()
        self.profiler = StepProfiler(config, (), dist.get_rank())
        self._connect_schedule()

    def allocate_optimizer_state(self) -> None:
        """One optimizer step on zero gradients: Adam's moments then exist, as they do from the second step on."""
        with self.ledger.everything_is(Part.OPTIMIZER):
            self.optimizer.step()

    def measure(self, micro_batches: Sequence[Batch]) -> None:
        """One whole step; the ledger's peaks on the device are those of the step.

        On the host they are those since the first weight: Megatron's hybrid optimizer first copies all weights of a
        rank there, later only those that the rank updates.
        """
        self.ledger.device.restart_peaks()
        with self.ledger.by_source():
            self._step(GlobalBatch(list(micro_batches), list(range(self.config.training.global_batch_size))))
