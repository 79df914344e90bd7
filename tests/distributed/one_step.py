"""What a rank does in the tests of layouts: start from a shared checkpoint, evaluate, run one global batch or two."""

from __future__ import annotations

import megatron_longpo.platform  # noqa: F401  before Megatron-Core  # isort: skip
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from tests.distributed.harness import fresh_world
from tests.distributed.nccl_order import Operation, noted_operations
from tests.distributed.parallel_load import parallel_load

Result = tuple[dict[str, float], list[Operation]]
"""Metrics, and the communication that led to them."""


def one_step(flags: list[str], data: str, save_to: str) -> dict[str, float]:
    """Evaluate and run one global batch from the shared checkpoint; leave its gradients as a checkpoint.

    To a folder whose name ends in "step", leave the weights after two steps instead: the gradients of a distributed
    optimizer lie in shards.
    """
    from megatron_longpo import platform
    from megatron_longpo.arguments import parse_arguments
    from megatron_longpo.data.dataset import PreferenceDataset
    from megatron_longpo.model.build import unwrap
    from megatron_longpo.training.checkpoint import Checkpointer, Progress
    from megatron_longpo.training.data import MicroBatches, training_batches
    from megatron_longpo.training.distributed import initialize
    from megatron_longpo.training.evaluation import evaluate
    from megatron_longpo.training.loop import Trainer
    from megatron_longpo.training.reference import reference_logprobs
    from megatron_longpo.training.step import run_global_batch
    from megatron_longpo.validation import validate

    if "sft-rejected" in " ".join(flags):
        flags = [flag for flag in flags if "--beta" not in flag]
    config = parse_arguments([*flags, f"--data-path={data}", f"--save={save_to}"])
    config = config.with_device_defaults(*platform.device_defaults())
    validate(config, torch.distributed.get_world_size())
    platform.prepare()
    dataset = PreferenceDataset(data, config.model.vocab_size)
    initialize(config)
    try:
        trainer = Trainer(config, dataset)
        reference = None
        if config.objective.needs_reference:
            with trainer.whole_weights():
                reference, _ = reference_logprobs(config, dataset, trainer.chunks, None)
        micro_batches = MicroBatches(config, dataset, reference)
        with trainer.whole_weights():
            held_out = evaluate(config, trainer.chunks, micro_batches, trainer.eval_numbers)
        trainer.sampler = trainer._sampler()
        batches = training_batches(micro_batches, trainer.sampler)
        if save_to.endswith("step"):
            # Megatron overlaps the reduction of gradients from the second on.
            for _ in range(2):
                metrics, bad = trainer._step(next(batches))
                assert bad is None
        else:
            metrics, _ = run_global_batch(config, trainer.chunks, next(batches), forward_only=False)
            for chunk in trainer.chunks:
                for parameter in unwrap(chunk).parameters():
                    parameter.data.copy_(parameter.main_grad)
        with trainer.whole_weights():
            Checkpointer(config, trainer.chunks).save(Progress(iteration=1))
    finally:
        parallel_state.destroy_model_parallel()
    named = {name: value for name, value in metrics.items() if "/" in name or name == "loss"}
    if "iteration_time_s" in metrics:  # of a whole step
        seconds = metrics["iteration_time_s"] * dist.get_world_size()
        named |= {name: metrics[name] * seconds for name in ("tokens_per_s_per_gpu", "tflops_per_gpu")}
    return named | {f"eval/{name}": value for name, value in held_out.items()}


def run_all(rank: int, cases: list[tuple[list[str], str, str]], folder: str) -> list[Result]:
    results = []
    for number, case in enumerate(cases):
        fresh_world(f"{folder}/rendezvous-{len(cases)}-{number}", rank, dist.get_world_size())
        with parallel_load(), noted_operations() as operations:
            metrics = one_step(*case)
        results.append((metrics, operations))
    return results


def save_model_and_run_all(
    rank: int, cases: list[tuple[list[str], str, str]], folder: str, model: list[str]
) -> list[Result]:
    """`run_all` in one process, from a new model."""
    save_random_model(rank, cases[0][1], f"{folder}/start", model)
    return run_all(rank, cases, folder)


def save_random_model(rank: int, data: str, folder: str, model: list[str]) -> None:
    """The weights from which every layout starts: what they are drawn as depends on the layout."""
    from megatron_longpo import platform
    from megatron_longpo.arguments import parse_arguments
    from megatron_longpo.model.build import build_model
    from megatron_longpo.training.checkpoint import Checkpointer, Progress
    from megatron_longpo.training.distributed import initialize

    config = parse_arguments([*model, f"--data-path={data}", f"--save={folder}"])
    config = config.with_device_defaults(*platform.device_defaults())
    initialize(config)
    Checkpointer(config, build_model(config)).save(Progress(iteration=1))
    parallel_state.destroy_model_parallel()
