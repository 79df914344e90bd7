"""The rates that a step reports, from the documents that it took."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_longpo.arguments import parse_arguments
from megatron_longpo.data.dataset import PreferenceDataset
from megatron_longpo.training.data import MicroBatches, training_batches
from megatron_longpo.training.loop import Trainer
from tests.tiny import VOCAB, write_tiny_dataset
from tests.training.commands import FLAGS


def test_tokens_and_flops_are_those_of_the_documents(world_of_one: None, tmp_path: Path) -> None:
    data = write_tiny_dataset(tmp_path / "tiny", num_documents=12)
    flags = [*FLAGS, f"--data-path={data}", "--objective=sft-chosen", "--train-iters=1"]
    config = parse_arguments(flags).with_device_defaults("local", "gloo")
    trainer = Trainer(config, PreferenceDataset(data))
    batch = next(training_batches(MicroBatches(config, trainer.dataset, None), trainer._sampler()))
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
