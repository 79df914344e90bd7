"""Single steps of a run: what is reported of them, and gradients that must not be applied."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from megatron_longpo.arguments import parse_arguments
from megatron_longpo.data.dataset import PreferenceDataset
from megatron_longpo.model.build import unwrap
from megatron_longpo.training.data import GlobalBatch, MicroBatches, training_batches
from megatron_longpo.training.loop import Trainer
from megatron_longpo.training.step import gradients_are_finite
from tests.tiny import VOCAB, write_tiny_dataset
from tests.training.commands import FLAGS
from tests.training.commands import metrics as metrics_of


def new_trainer(folder: Path, *more: str) -> Trainer:
    data = write_tiny_dataset(folder / "tiny", num_documents=12)
    flags = [*FLAGS, f"--data-path={data}", "--objective=sft-chosen", "--lr=1e-2", *(more or ["--train-iters=4"])]
    return Trainer(parse_arguments(flags).with_device_defaults("local", "gloo"), PreferenceDataset(data))


def trainer_and_batch(folder: Path) -> tuple[Trainer, GlobalBatch]:
    trainer = new_trainer(folder)
    return trainer, next(training_batches(MicroBatches(trainer.config, trainer.dataset, None), trainer._sampler()))


def test_tokens_and_flops_are_those_of_the_documents(world_of_one: None, tmp_path: Path) -> None:
    trainer, batch = trainer_and_batch(tmp_path)
    metrics, _ = trainer._step(batch)
    lengths = []
    for number in batch.numbers:
        document = trainer.dataset[number]
        assert document.joint is not None
        lengths.append(len(document.document_tokens) + len(document.joint[0].tokens))
    seconds = metrics["iteration_time_s"]
    assert metrics["tokens_per_s_per_gpu"] * seconds == pytest.approx(sum(lengths))
    # 4 layers: queries and output 32 x 64, keys and values 32 x 32, the MLP's three 32 x 48; a causal pair costs
    # 4 * 64. The LM head sees every token but the last.
    per_token = 2 * 4 * 32 * (2 * 64 + 2 * 32 + 3 * 48)
    forward = sum(per_token * n + 4 * 4 * 64 * n * (n + 1) // 2 + 2 * 32 * VOCAB * (n - 1) for n in lengths)
    assert metrics["tflops_per_gpu"] * 1e12 * seconds == pytest.approx(3 * forward)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_is_not_applied(world_of_one: None, tmp_path: Path, value: float) -> None:
    """The loss may be finite all the same."""
    trainer, batch = trainer_and_batch(tmp_path)
    parameters = dict(unwrap(trainer.chunks[0]).named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    hook = parameters["decoder.final_layernorm.weight"].register_hook(lambda gradient: gradient.fill_(value))
    metrics, bad = trainer._step(batch)
    assert math.isfinite(metrics["loss"]) and math.isnan(metrics["grad_norm"])
    assert bad == [trainer.dataset[number].id for number in batch.numbers], "each of them may be the one"
    assert all(torch.equal(parameter, before[name]) for name, parameter in parameters.items())
    hook.remove()
    healthy, _ = trainer_and_batch(tmp_path / "healthy")
    assert not gradients_are_finite([*healthy.chunks, *trainer.chunks]), "one chunk is enough"
    again, bad = trainer._step(batch)
    assert bad is None and math.isfinite(again["grad_norm"])
    assert again["learning_rate"] == metrics["learning_rate"], "the schedule waits"
    progress = trainer.progress
    assert (progress.iteration, progress.consumed_samples, progress.skipped_steps) == (2, 2 * len(batch.numbers), 1)


def test_what_a_run_reports_and_when(world_of_one: None, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    when = ["--train-iters=4", "--log-interval=3", "--eval-interval=2", "--eval-iters=1"]
    new_trainer(tmp_path, f"--metrics-jsonl={path}", *when).train()
    lines = [(line["iteration"], line["consumed_samples"], "eval/loss" in line) for line in metrics_of(path)]
    # The last steps too, if no interval ends with them.
    assert lines == [(2, 4, True), (3, 6, False), (4, 8, False), (4, 8, True)]


@pytest.mark.parametrize(
    ("length", "steps"), [("--train-iters=3", 3), ("--train-samples=9", 4), ("--train-epochs=2", 10)]
)
def test_the_length_of_a_run(world_of_one: None, tmp_path: Path, length: str, steps: int) -> None:
    trainer = new_trainer(tmp_path, length)
    assert len(trainer.train_numbers) == 10 and trainer.config.training.global_batch_size == 2
    assert (trainer.total_steps, trainer.total_samples) == (steps, 2 * steps)
