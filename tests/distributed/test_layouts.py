"""One global batch under every parallel layout: losses, metrics, gradients and updated weights equal one process's.

All layouts of a world of four run in the same four processes, one after another; data parallelism fills the rest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state

from tests.distributed.harness import fresh_world, run_ranks
from tests.tiny import MODEL_FLAGS, write_tiny_dataset

TP, PP, CP = "--tensor-model-parallel-size=2", "--pipeline-model-parallel-size=2", "--context-parallel-size=2"
LAYOUTS = {
    "DP 4": [],
    "DP 2 of two documents a row": ["--micro-batch-size=2", TP],
    "TP 2": [TP],
    "TP 2 + sequence parallel": [TP, "--sequence-parallel"],
    "PP 2": [PP],
    "interleaved PP 2": [PP, "--num-layers-per-virtual-pipeline-stage=1"],
    "CP 2 all-gather": [CP],
    "CP 2 all-to-all": [CP, "--cp-comm-type=a2a"],
    "CP 4": ["--context-parallel-size=4"],
    "TP 2 x CP 2": [TP, CP],
    "TP 2 x CP 2 + sequence parallel": [TP, CP, "--sequence-parallel"],
    "TP 2 x PP 2": [TP, PP],
    "PP 2 x CP 2": [PP, CP],
    "TP 2 + full recompute": [
        TP,
        "--recompute-granularity=full",
        "--recompute-method=uniform",
        "--recompute-num-layers=1",
    ],
    "CP 2 + selective recompute": [CP, "--recompute-granularity=selective", "--recompute-modules=core_attn"],
}
OBJECTIVES = {
    "longpo": ["--objective=longpo", "--lambda=0.5"],
    "dpo": ["--objective=dpo", "--lambda=0.5", "--turns=independent", "--turn-reduction=mean"],
    "sft-rejected": ["--objective=sft-rejected"],
    "constraint": ["--objective=sft-chosen-constraint"],
}
CASES = [("longpo", name) for name in LAYOUTS]
CASES += [
    (objective, name) for objective in ("dpo", "constraint") for name in ("TP 2 x CP 2", "PP 2", "CP 2 all-to-all")
]
CASES += [("sft-rejected", "CP 2 all-gather")]
COMMON = [
    *MODEL_FLAGS,
    "--seq-length=512",
    "--global-batch-size=8",
    "--train-iters=2",
    "--split=90,10",
    "--lr=1e-2",
    "--lr-decay-style=constant",
    "--lr-warmup-fraction=0",
    "--adam-eps=1e-2",
    "--beta=0.5",
    "--num-workers=0",
    "--progress-bar=off",
    "--logits-chunk-tokens=16",
    "--finetune",
]


def one_step(flags: list[str], data: str, gradients_to: str | None) -> dict[str, float]:
    """Run one global batch from the shared checkpoint; leave its gradients as a checkpoint of their own."""
    from megatron_longpo import platform
    from megatron_longpo.arguments import parse_arguments
    from megatron_longpo.data.dataset import PreferenceDataset
    from megatron_longpo.model.build import unwrap
    from megatron_longpo.training.checkpoint import Checkpointer, Progress
    from megatron_longpo.training.data import MicroBatches, training_batches
    from megatron_longpo.training.distributed import initialize
    from megatron_longpo.training.loop import Trainer
    from megatron_longpo.training.reference import reference_logprobs
    from megatron_longpo.training.step import document_loss, global_batch_metrics, run_schedule
    from megatron_longpo.validation import validate

    if "sft-rejected" in " ".join(flags):
        flags = [flag for flag in flags if "--beta" not in flag]
    save = [f"--save={gradients_to}"] if gradients_to else []
    config = parse_arguments([*flags, f"--data-path={data}", *save])
    config = config.with_device_defaults(platform.default_transformer_impl(), platform.default_backend())
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
        batch = next(training_batches(MicroBatches(config, dataset, reference), trainer._sampler()))
        if config.parallel.use_distributed_optimizer:
            # Its gradients lie in shards: compare the weights after the step instead.
            trainer.sampler = trainer._sampler()
            metrics, bad = trainer._step(batch)
            assert bad is None
        else:
            outputs = run_schedule(
                config,
                trainer.chunks,
                batch.micro_batches,
                lambda b, logps: document_loss(config.objective, b, logps),
                forward_only=False,
            )
            metrics, _ = global_batch_metrics(config, outputs, len(batch.numbers))
            if gradients_to and not gradients_to.endswith("step"):
                for chunk in trainer.chunks:
                    for parameter in unwrap(chunk).parameters():
                        parameter.data.copy_(parameter.main_grad)
            elif gradients_to:
                trainer.optimizer.step()
        if gradients_to:
            with trainer.whole_weights():
                Checkpointer(config, trainer.chunks).save(Progress(iteration=1))
    finally:
        parallel_state.destroy_model_parallel()
    return {name: value for name, value in metrics.items() if "/" in name or name == "loss"}


def run_all(rank: int, cases: list[tuple[list[str], str, str | None]], folder: str) -> list[dict[str, float]]:
    results = []
    for number, case in enumerate(cases):
        fresh_world(f"{folder}/rendezvous-{len(cases)}-{number}", rank, dist.get_world_size())
        results.append(one_step(*case))
    return results


def load_tensors(rank: int, folders: dict[str, str]) -> dict[str, dict[str, torch.Tensor]]:
    def floats(folder: str) -> dict[str, torch.Tensor]:
        loaded = dist_checkpointing.load_plain_tensors(str(Path(folder) / "iter_0000001"))
        return {k: v for k, v in loaded.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}

    return {name: floats(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("layouts")
    data = str(write_tiny_dataset(folder / "data" / "tiny", num_documents=20))
    start = [*COMMON, f"--load={folder / 'start'}"]
    step_flags = [*start, *OBJECTIVES["longpo"]]

    singles = [([*start, *flags], data, f"{folder / name}") for name, flags in OBJECTIVES.items()]
    singles.append((step_flags, data, f"{folder / 'one-step'}"))
    run_ranks(save_random_model, 1, data, str(folder / "start"))
    single_metrics = run_ranks(run_all, 1, singles, str(folder))[0]

    layouts = [
        ([*start, *OBJECTIVES[objective], *LAYOUTS[name]], data, f"{folder / objective}-{number}")
        for number, (objective, name) in enumerate(CASES)
    ]
    zero = ["--use-distributed-optimizer"]
    layouts += [([*step_flags, *zero, *more], data, f"{folder / f'zero{n}-step'}") for n, more in enumerate(ZERO)]
    metrics = run_ranks(run_all, 4, layouts, str(folder))
    folders = {
        **{f"one {name}": f"{folder / name}" for name in OBJECTIVES},
        "one step": f"{folder / 'one-step'}",
        **{f"{o} {name}": f"{folder / o}-{number}" for number, (o, name) in enumerate(CASES)},
        **{f"zero {n}": f"{folder / f'zero{n}-step'}" for n in range(len(ZERO))},
    }
    tensors = run_ranks(load_tensors, 1, folders)[0]
    return {
        "single": dict(zip([*OBJECTIVES, "step"], single_metrics, strict=True)),
        "metrics": {case: [rank[i] for rank in metrics] for i, case in enumerate(CASES)},
        "zero": [[rank[len(CASES) + i] for rank in metrics] for i in range(len(ZERO))],
        "tensors": tensors,
    }


ZERO = [[], ["--overlap-grad-reduce", "--overlap-param-gather"], [TP, "--sequence-parallel"], [PP]]


def save_random_model(rank: int, data: str, folder: str) -> None:
    """The weights from which every layout starts: what they are drawn as depends on the layout."""
    from megatron_longpo import platform
    from megatron_longpo.arguments import parse_arguments
    from megatron_longpo.model.build import build_model
    from megatron_longpo.training.checkpoint import Checkpointer, Progress
    from megatron_longpo.training.distributed import initialize

    config = parse_arguments([*MODEL_FLAGS, f"--data-path={data}", f"--save={folder}"])
    config = config.with_device_defaults(platform.default_transformer_impl(), platform.default_backend())
    initialize(config)
    Checkpointer(config, build_model(config)).save(Progress(iteration=1))
    parallel_state.destroy_model_parallel()


def assert_equal_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], what: str) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        # Vocabulary padding depends on TP and holds nothing.
        rows = min(len(expected), len(ours[name]))
        difference = (ours[name][:rows] - expected[:rows]).norm() / expected.norm().clamp_min(1e-30)
        assert difference < 1e-5, f"{what} of {name}: relative difference {difference:.2e}"


@pytest.mark.parametrize(("objective", "layout"), CASES)
def test_layout_equals_one_process(results: dict[str, Any], objective: str, layout: str) -> None:
    expected = dict(results["single"][objective])
    # DPO's reference is the model itself at first: margins are 0 up to rounding, and their sign says nothing.
    ignored = {"rewards/accuracies"} if objective == "dpo" else set()
    for rank in results["metrics"][objective, layout]:
        assert rank.keys() == expected.keys()
        compared = {name: value for name, value in rank.items() if name not in ignored}
        assert compared == pytest.approx({name: expected[name] for name in compared}, rel=1e-5, abs=1e-6)
    gradients = results["tensors"][f"one {objective}"]
    assert len(gradients) > 5 and all(gradient.norm() > 1e-3 for gradient in gradients.values())
    assert_equal_tensors(results["tensors"][f"{objective} {layout}"], gradients, "gradient")


@pytest.mark.parametrize("number", range(len(ZERO)), ids=[" ".join(more) or "DP 4" for more in ZERO])
def test_distributed_optimizer_makes_the_same_step(results: dict[str, Any], number: int) -> None:
    for rank in results["zero"][number]:
        assert rank == pytest.approx(results["single"]["step"], rel=1e-5, abs=1e-6)
    assert_equal_tensors(results["tensors"][f"zero {number}"], results["tensors"]["one step"], "updated weight")


def test_objectives_differ(results: dict[str, Any]) -> None:
    losses = {name: results["single"][name]["loss"] for name in OBJECTIVES}
    assert len(set(losses.values())) == len(losses), losses
