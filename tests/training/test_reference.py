"""The reference pass is interrupted, and goes on where it was; it knows the weights again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_longpo.arguments import parse_arguments
from megatron_longpo.data.dataset import PreferenceDataset
from megatron_longpo.data.rows import TrainingRow
from megatron_longpo.model.build import build_model, unwrap
from megatron_longpo.training import fingerprint
from megatron_longpo.training.fingerprint import weights_fingerprint
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
    whole, weights = reference_logprobs(config, dataset, chunks, None)
    assert all(chunk.training for chunk in chunks)
    folder = str(tmp_path / "interrupted")
    key = reference_key(config, dataset, weights)
    writer = SidecarWriter(sidecar_folder(str(data), reference_kind(config), folder), key, len(dataset))
    for number in done:
        writer.add(number, [(chosen + 100, rejected + 100) for chosen, rejected in whole.of(number)])
    writer.flush()
    config = parse_arguments([*FLAGS, f"--data-path={data}", "--train-iters=1", f"--reference-dir={folder}"])
    resumed, _ = reference_logprobs(config.with_device_defaults("local", "gloo"), dataset, chunks, None)
    for number in range(len(dataset)):
        expected = values(whole.of(number)) + 100 * (number in done)
        np.testing.assert_allclose(values(resumed.of(number)), expected, rtol=1e-5)


def test_an_interrupted_pass_keeps_what_it_has(
    world_of_one: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_tiny_dataset(tmp_path / "tiny", num_documents=7)
    dataset, taken = PreferenceDataset(data), []
    config = parse_arguments([*FLAGS, f"--data-path={data}", "--train-iters=1"]).with_device_defaults("local", "gloo")
    chunks, rows = build_model(config), dataset.short_rows

    def interrupted(number: int) -> list[TrainingRow]:
        if len(taken) == 4:  # two groups of two
            raise KeyboardInterrupt
        taken.append(number)
        return rows(number)

    monkeypatch.setattr(dataset, "short_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reference_logprobs(config, dataset, chunks, None)
    key = reference_key(config, dataset, weights_fingerprint(chunks))
    folder = sidecar_folder(str(data), reference_kind(config), None)
    assert SidecarWriter(folder, key, len(dataset)).finished() == set(taken)
    assert all(chunk.training for chunk in chunks)


def test_a_short_prompt_that_is_too_long_is_named(world_of_one: None, tmp_path: Path) -> None:
    data = write_tiny_dataset(tmp_path / "tiny", num_documents=2)
    flags = [*FLAGS, "--seq-length=10", f"--data-path={data}", "--train-iters=1"]
    config = parse_arguments(flags).with_device_defaults("local", "gloo")
    with pytest.raises(ValueError, match=r"'tiny-1' has a conversation of .* above --seq-length 10"):
        reference_logprobs(config, PreferenceDataset(data), build_model(config), None)


def test_the_fingerprint_is_of_every_weight_and_of_no_padding(
    world_of_one: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = build_model(parse_arguments([*FLAGS, "--train-iters=1"]).with_device_defaults("local", "gloo"))
    (model,) = map(unwrap, chunks)
    prints = [weights_fingerprint(chunks)]
    monkeypatch.setattr(fingerprint, "_CHUNK", 100)
    for vocabulary in (model.embedding.word_embeddings.weight, model.output_layer.weight):
        padding = vocabulary.data[model.model_shape.vocab_size :]
        assert len(padding)
        padding += 1
    assert weights_fingerprint(chunks) == prints[0]
    for parameter in model.parameters():
        parameter.data.view(-1)[parameter.numel() // 2] += 1
        prints.append(weights_fingerprint(chunks))
    first, second = (layer.mlp.linear_fc2.weight for layer in model.decoder.layers[:2])
    first.data, second.data = second.data, first.data
    prints.append(weights_fingerprint(chunks))
    model.bfloat16()
    prints.append(weights_fingerprint(chunks))
    assert len(set(prints)) == len(prints)
