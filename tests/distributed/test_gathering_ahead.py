"""In the backward pass a layer's keys are gathered while the layer behind it, or its own MLP, is differentiated."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.harness import run_ranks
from tests.distributed.late import late_transfers
from tests.tiny import MODEL_FLAGS, write_tiny_dataset

NUM_LAYERS = 4
FULL = ["--recompute-granularity=full", "--recompute-method=uniform", "--recompute-num-layers=1"]
KEPT = [*FULL, "--recompute-keep-attention"]
CASES = {
    "plain": [],
    "attention kept": KEPT,
    "attention kept, groups of 3": [*KEPT, "--recompute-num-layers=3"],
    "attention kept, 2 layers of a block": [*KEPT, "--recompute-method=block", "--recompute-num-layers=2"],
    "full recompute": FULL,
    "offload": ["--cpu-offloading-num-layers=4"],
}


def backward_pass(flags: list[str], data: str, ahead: bool) -> tuple[list[str], list[torch.Tensor]]:
    """What one micro-batch's backward pass does, in order, and the gradients; ``ahead`` False gathers nothing early."""
    from megatron_longpo.arguments import parse_arguments
    from megatron_longpo.attention import all_gather, function
    from megatron_longpo.attention.kernels import CpuFlashKernel
    from megatron_longpo.data.dataset import PreferenceDataset
    from megatron_longpo.model import offload
    from megatron_longpo.model.build import unwrap
    from megatron_longpo.training.data import MicroBatches, training_batches
    from megatron_longpo.training.loop import Trainer
    from megatron_longpo.training.step import document_loss, run_schedule

    fixed = [
        "--context-parallel-size=2",
        "--global-batch-size=1",
        "--train-iters=1",
        "--split=100,0",
        "--num-workers=0",
    ]
    config = parse_arguments(
        [*MODEL_FLAGS, *fixed, "--seq-length=512", "--objective=sft-chosen", f"--data-path={data}", *flags]
    ).with_device_defaults("local", "gloo")
    dataset = PreferenceDataset(data, config.model.vocab_size)
    torch.manual_seed(0)
    trainer = Trainer(config, dataset)
    (batch,) = next(training_batches(MicroBatches(config, dataset, None), trainer._sampler())).micro_batches
    events: list[str] = []

    def logged(patch: pytest.MonkeyPatch, owner: type, method: str, event: str) -> None:
        original = getattr(owner, method)

        def call(*args: Any) -> Any:
            if not events or events[-1] != event:  # attention is several kernels
                events.append(event)
            return original(*args)

        patch.setattr(owner, method, call)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offload, "OFFLOAD_FROM_BYTES", 0)
        logged(patch, all_gather._Gather, "__init__", "gather")
        logged(patch, CpuFlashKernel, "backward", "attention")
        logged(patch, all_gather._LocalSum, "wait", "sum")
        if not ahead:
            patch.setattr(all_gather._AllGather, "start_backward", lambda *_: None)
        (chunk,) = trainer.chunks
        for layer in unwrap(chunk).decoder.layers:
            layer.mlp.register_full_backward_pre_hook(lambda *_: events.append("MLP"))

        def loss(b: Any, logps: torch.Tensor) -> Any:
            events.clear()
            return document_loss(config.objective, b, logps)

        run_schedule(config, trainer.chunks, [batch], loss, forward_only=False)
    gradients = [parameter.main_grad.clone() for parameter in unwrap(chunk).parameters()]
    gc.collect()
    assert not function._last_on_row, "a row's last attention outlived the row"
    return events, gradients


def run_cases(rank: int, data: str, names: list[str]) -> dict[str, tuple[list[str], bool]]:
    """Per case: the order of events, and whether keys gathered early, and arriving late, change a bit of a gradient."""
    from megatron_longpo import platform
    from megatron_longpo.arguments import parse_arguments
    from megatron_longpo.training.distributed import initialize

    platform.prepare()
    flags = [*MODEL_FLAGS, "--context-parallel-size=2"]
    initialize(parse_arguments(flags).with_device_defaults("local", "gloo"))
    results = {}
    for name in names:
        case = CASES[name]
        with late_transfers():
            events, gradients = backward_pass(case, data, ahead=True)
        _, expected = backward_pass(case, data, ahead=False)
        assert all(gradient.norm() > 1e-4 for gradient in gradients)
        results[name] = events, all(map(torch.equal, gradients, expected))
    return results


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["attention kept"], id="default"),
        pytest.param([name for name in CASES if name != "attention kept"], id="more", marks=pytest.mark.slow),
    ],
)
def test_keys_are_gathered_ahead_of_their_gradient(tmp_path: Path, names: list[str]) -> None:
    data = write_tiny_dataset(tmp_path / "tiny", num_documents=1)
    layer = ["MLP", "attention", "sum"]
    # Nothing comes behind the last layer's attention that it could be gathered behind, but its own MLP if recomputed.
    plain = ["MLP", "gather", "attention", "sum", *(["gather", *layer] * (NUM_LAYERS - 1))]
    kept = ["gather", *layer] * NUM_LAYERS
    expected = {
        "plain": plain,
        "offload": plain,
        "attention kept": kept,
        "attention kept, groups of 3": kept,
        # Two recomputed layers in front of two plain ones, which are a chain of their own.
        "attention kept, 2 layers of a block": [*plain[: 2 * len(layer) + 2], *kept[: 2 * len(layer) + 2]],
        # Forward gathers once more, and the backward pass after it.
        "full recompute": ["gather", "MLP", "gather", "attention", "sum"] * NUM_LAYERS,
    }
    for results in run_ranks(run_cases, 2, str(data), names):
        for name, (events, equal) in results.items():
            assert events == expected[name], name
            assert equal, f"{name}: gathering ahead changed a gradient"
