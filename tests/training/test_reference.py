"""The reference pass goes on where it was interrupted."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_longpo.arguments import parse_arguments
from megatron_longpo.data.dataset import PreferenceDataset
from megatron_longpo.model.build import build_model
from megatron_longpo.training.reference import reference_key, reference_kind, reference_logprobs
from megatron_longpo.training.sidecar import SidecarWriter, TurnLogps, sidecar_folder
from tests.tiny import write_tiny_dataset
from tests.training.commands import FLAGS


def values(turns: TurnLogps) -> np.ndarray:
    return np.concatenate([tokens for pair in turns for tokens in pair])


def test_documents_of_an_interrupted_pass_are_not_computed_again(world_of_one: None, tmp_path: Path) -> None:
    data = write_tiny_dataset(tmp_path / "tiny", num_documents=7)
    dataset, done = PreferenceDataset(data), (1, 2, 6)
    config = parse_arguments([*FLAGS, f"--data-path={data}", "--train-iters=1"]).with_device_defaults("local", "gloo")
    chunks = build_model(config)
    whole, fingerprint = reference_logprobs(config, dataset, chunks, None)
    folder = str(tmp_path / "interrupted")
    key = reference_key(config, dataset, fingerprint)
    writer = SidecarWriter(sidecar_folder(str(data), reference_kind(config), folder), key, len(dataset))
    for number in done:
        writer.add(number, [(chosen + 100, rejected + 100) for chosen, rejected in whole.of(number)])
    writer.flush()
    config = parse_arguments([*FLAGS, f"--data-path={data}", "--train-iters=1", f"--reference-dir={folder}"])
    resumed, _ = reference_logprobs(config.with_device_defaults("local", "gloo"), dataset, chunks, None)
    for number in range(len(dataset)):
        expected = values(whole.of(number)) + 100 * (number in done)
        np.testing.assert_allclose(values(resumed.of(number)), expected, rtol=1e-5)
