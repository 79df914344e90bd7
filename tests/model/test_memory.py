"""Every way to need less memory changes no gradient: one global batch through the real model, several micro-batches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.live_bytes import LiveBytes
from megatron_longpo.arguments import parse_arguments
from megatron_longpo.attention.kernels import CpuFlashKernel
from megatron_longpo.data.dataset import PreferenceDataset
from megatron_longpo.model import build, offload
from megatron_longpo.model.build import unwrap
from megatron_longpo.model.remade import Remaking
from megatron_longpo.model.rope import rotate
from megatron_longpo.training.data import MicroBatches, training_batches
from megatron_longpo.training.loop import Trainer
from megatron_longpo.training.step import document_loss, run_schedule
from megatron_longpo.validation import validate
from tests.tiny import MODEL_FLAGS, write_tiny_dataset

FULL = ["--recompute-granularity=full", "--recompute-method=uniform", "--recompute-num-layers=1"]
KEPT = [*FULL, "--recompute-keep-attention"]
PIECES = ["--mlp-chunk-tokens=16", "--projection-chunk-tokens=16"]
CASES = {
    "plain": [],
    "full recompute": FULL,
    "full recompute, groups of 3": [*FULL, "--recompute-num-layers=3"],
    "attention kept": KEPT,
    "MLP in pieces": ["--mlp-chunk-tokens=7"],
    "projections in pieces": ["--projection-chunk-tokens=7"],
    "offload": ["--cpu-offloading-num-layers=4"],
    "offload, in pieces": ["--cpu-offloading-num-layers=3", *PIECES],
    "offload, attention kept, in pieces": [*KEPT, "--cpu-offloading-num-layers=3", *PIECES],
    "offload, full recompute": [*FULL, "--cpu-offloading-num-layers=4"],
    "attention kept, groups of 3": [*KEPT, "--recompute-num-layers=3"],
    "attention kept, 2 layers of a block": [*KEPT, "--recompute-method=block", "--recompute-num-layers=2"],
}
EVERYTHING = "outputs of norms and gates kept"
NUM_LAYERS = 4


@dataclass
class Result:
    """Gradients by name, log-probs of an evaluation, how often the attention kernel ran, peaks of live tensors."""

    gradients: dict[str, torch.Tensor]
    evaluated: list[torch.Tensor]
    forward_calls: int
    backward_calls: int
    peak_bytes: int
    host_bytes: int


def run(flags: list[str], data: Path, patch: pytest.MonkeyPatch) -> Result:
    """The gradients of four documents in four micro-batches."""
    fixed = ["--global-batch-size=4", "--train-iters=1", "--split=100,0", "--seq-length=512", "--num-workers=0"]
    config = parse_arguments([*MODEL_FLAGS, *fixed, "--objective=sft-chosen", f"--data-path={data}", *flags])
    config = config.with_device_defaults("local", "gloo")
    patch.setattr(offload, "OFFLOAD_FROM_BYTES", 0)
    validate(config, 1)
    counts = {"forward": 0, "backward": 0}
    for name in counts:
        original = getattr(CpuFlashKernel, name)

        def counted(*args: Any, name: str = name, original: Any = original) -> Any:
            counts[name] += 1
            return original(*args)

        patch.setattr(CpuFlashKernel, name, counted)
    dataset = PreferenceDataset(str(data), config.model.vocab_size)
    torch.manual_seed(0)
    trainer = Trainer(config, dataset)
    batch = next(training_batches(MicroBatches(config, dataset, None), trainer._sampler()))

    def schedule(forward_only: bool) -> list[Any]:
        def loss(b: Any, logps: torch.Tensor) -> Any:
            summed, count, _ = document_loss(config.objective, b, logps)
            return summed, count, logps.detach()

        return run_schedule(config, trainer.chunks, batch.micro_batches, loss, forward_only)

    for chunk in trainer.chunks:
        chunk.eval()
    with torch.no_grad():
        evaluated = schedule(forward_only=True)
    for chunk in trainer.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    counts.update(forward=0)
    with LiveBytes() as live, live.hosts_left_out():
        schedule(forward_only=False)
    patch.undo()
    gradients = {name: p.main_grad.clone() for name, p in unwrap(trainer.chunks[0]).named_parameters()}
    return Result(gradients, evaluated, counts["forward"], counts["backward"], live.peak, live.on_host)


@pytest.fixture(scope="module")
def results(world_of_one: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    data = write_tiny_dataset(tmp_path_factory.mktemp("memory") / "tiny", num_documents=4)
    with pytest.MonkeyPatch.context() as patch:
        measured = {name: run(flags, data, patch) for name, flags in CASES.items()}
        patch.setattr(Remaking, "note", lambda *_: None)
        return measured | {EVERYTHING: run([], data, patch)}


@pytest.mark.parametrize("case", [EVERYTHING, *(name for name in CASES if name != "plain")])
def test_gradients_are_equal(results: dict[str, Result], case: str) -> None:
    plain, ours = results["plain"], results[case]
    assert ours.gradients.keys() == plain.gradients.keys() and len(plain.gradients) == NUM_LAYERS * 6 + 3
    for name, expected in plain.gradients.items():
        assert expected.norm() > 1e-4
        difference = (ours.gradients[name] - expected).norm() / expected.norm()
        assert difference < 1e-6, f"{name} is off by {difference:.1e}"
    for mine, theirs in zip(ours.evaluated, plain.evaluated, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def test_attention_that_is_kept_runs_once(results: dict[str, Result]) -> None:
    once = results["plain"].forward_calls
    for name, result in results.items():
        assert result.backward_calls == once
        assert result.forward_calls == (2 * once if "full" in name else once), name


def test_peak_memory_falls(results: dict[str, Result]) -> None:
    peak = {name: result.peak_bytes for name, result in results.items()}
    assert peak["plain"] < 0.87 * peak[EVERYTHING]
    # A whole layer's inner activations exist during its own backward pass, whatever else is kept.
    assert peak["MLP in pieces"] < 0.85 * peak["plain"]
    assert peak["offload"] < 0.75 * peak["plain"]
    assert peak["full recompute"] < peak["attention kept"] < 0.75 * peak["plain"]
    assert peak["offload, attention kept, in pieces"] < 0.9 * peak["attention kept"]
    for name, result in results.items():
        assert (result.host_bytes > 0) == ("offload" in name)


def test_megatron_s_attention_rotates_with_ours(
    world_of_one: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries and keys of every layer; Megatron's own rotation would keep cosines and sines."""
    calls: list[torch.Size] = []

    def counted(heads: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(heads.shape)
        return rotate(heads, *args, **kwargs)

    monkeypatch.setattr(build, "rotate", counted)
    run([], write_tiny_dataset(tmp_path / "tiny"), monkeypatch)
    num_layers, micro_batches, passes = 4, 4, 2
    assert len(calls) == 2 * num_layers * micro_batches * passes
