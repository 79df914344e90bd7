"""A training step of the real trainer on fake CUDA tensors. Runs in a process that `device.pretend` prepared."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.gpu import rates
from benchmarks.gpu.settings import TINY
from megatron_longpo import platform
from megatron_longpo.arguments import parse_arguments
from megatron_longpo.attention import selection
from megatron_longpo.attention.cudnn import CudnnKernel
from megatron_longpo.config import RunConfig
from megatron_longpo.data.batch import Batch
from megatron_longpo.data.dataset import PreferenceDataset
from megatron_longpo.model import offload
from megatron_longpo.model.build import unwrap
from megatron_longpo.planning.dry_run import fake_batch
from megatron_longpo.planning.fake_world import fake_tensors, fake_world
from megatron_longpo.planning.replaced import replaced
from megatron_longpo.planning.workload import batch_of
from megatron_longpo.training import reference
from megatron_longpo.training.data import GlobalBatch
from megatron_longpo.training.fingerprint import weights_fingerprint
from megatron_longpo.training.loop import Trainer
from megatron_longpo.training.step import run_schedule
from megatron_longpo.validation import validate
from tests.fake_cuda import device
from tests.fake_cuda.cases import Case
from tests.fake_cuda.watching import Watch
from tests.tiny import write_tiny_dataset

_DOCUMENT = 1
"""Of the dataset: it has two turns."""


def trace_run(case: Case) -> dict[str, Any]:
    """Build the trainer, let the optimizer make its state, then watch a step and a reference pass."""
    with tempfile.TemporaryDirectory() as folder:
        prefix = write_tiny_dataset(Path(folder, "tiny"), num_documents=_DOCUMENT + 1)
        config = _config(case, prefix)
        dataset = PreferenceDataset(prefix)
        with fake_world(config, case.rank, case.world_size):
            rows = [dataset.row(_DOCUMENT, config.objective.turns)]
            batch = batch_of(config, rows, parallel_state.get_context_parallel_rank())
            prompts = reference._collate(config, dataset, _DOCUMENT, reference.reference_kind(config))
            watch = Watch()
            thresholds = replaced(offload, "OFFLOAD_FROM_BYTES", 2**10), _short_rows_for_cudnn()
            with fake_tensors(batch.layout) as mode, thresholds[0], thresholds[1], watch:
                trainer = _trainer(config, dataset, batch)
                weights_fingerprint(trainer.chunks)
                numbers = list(range(config.training.global_batch_size))
                batches = GlobalBatch([fake_batch(batch, mode)] * config.num_microbatches(case.world_size), numbers)
                trainer.optimizer.step()
                _start_again(watch)
                _, skipped = trainer._step(batches)
                assert skipped is None
                facts = _facts(watch) | _tensors(trainer)
                _start_again(watch)
                _reference_pass(trainer, [fake_batch(prompts, mode)] * len(batches.micro_batches))
                return facts | {"reference pass": _facts(watch), "races": sorted(watch.races.found)}


def trace_rates() -> dict[str, Any]:
    """What the GPU benchmark measures of kernels."""
    settings = dataclasses.replace(TINY, matmul_size=64, attention_tokens=64)
    watch = Watch()
    with FakeTensorMode(), _short_rows_for_cudnn(), watch:
        rates.matmul_tflops(settings)
        for backend, dtype in (("flash", torch.float32), ("flash", torch.bfloat16), ("fused", torch.bfloat16)):
            rates.attention_tflops(settings, backend)
            try:
                rates.kernel_error(dtype, backend)
            except RuntimeError as error:
                # Every number that fake tensors are asked for is 1.
                assert "is off by 1.0e+00" in str(error)
    return _facts(watch)


def _short_rows_for_cudnn() -> AbstractContextManager[None]:
    """Every tile is in whole blocks."""
    return replaced(selection, "CudnnKernel", functools.partial(CudnnKernel, 1, 1))


def _config(case: Case, prefix: Path) -> RunConfig:
    config = parse_arguments([*case.flags, f"--data-path={prefix}"])
    platform.prepare(config.training.use_cpu)
    assert platform.has_cuda() and parallel_state.torch is torch, "prepared for a CPU"
    config = config.with_device_defaults(*platform.device_defaults())
    validate(config, case.world_size)
    platform.use_attention_backend(config.training.attention_backend)
    return config


def _trainer(config: RunConfig, dataset: PreferenceDataset, batch: Batch) -> Trainer:
    # Lengths travel between stages as numbers, which fake tensors lack: every row here has the same.
    data = dataclasses.replace(config.data, seq_length=batch.layout.padded_tokens)
    trainer = Trainer(dataclasses.replace(config, data=data), dataset)
    for chunk in trainer.chunks:
        chunk.config.variable_seq_lengths = False
    return trainer


def _reference_pass(trainer: Trainer, batches: list[Batch]) -> None:
    """The pass itself; what is around it turns results into numbers and files."""
    for chunk in trainer.chunks:
        chunk.eval()
    with torch.no_grad(), unwrap(trainer.chunks[0]).as_reference(trainer.config.reference_rope, None):
        run_schedule(trainer.config, trainer.chunks, batches, reference._keep_logps, forward_only=True)


def _start_again(watch: Watch) -> None:
    watch.start_again()
    device.host_waits.clear()


def _facts(watch: Watch) -> dict[str, Any]:
    return {
        "calls": dict(watch.calls),
        "dtypes": {name: sorted(dtypes) for name, dtypes in watch.dtypes.items()},
        "on_host": dict(watch.on_host),
        "waits": dict(watch.waits),
        "synchronizations": dict(device.host_waits),
    }


def _tensors(trainer: Trainer) -> dict[str, Any]:
    parameters = [p for chunk in trainer.chunks for p in chunk.parameters()]
    return {
        "weights": sorted({_kind(p) for p in parameters}),
        "gradients": sorted({_kind(p.main_grad) for p in parameters}),
    }


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
