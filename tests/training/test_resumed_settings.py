"""What a resumed run takes from its flags, and not from the checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_longpo.arguments import parse_arguments
from megatron_longpo.data.dataset import PreferenceDataset
from megatron_longpo.training.checkpoint import Progress
from megatron_longpo.training.data import MicroBatches, training_batches
from megatron_longpo.training.loop import Trainer
from tests.tiny import write_tiny_dataset
from tests.training.commands import FLAGS


@pytest.mark.parametrize("optimizer", [[], ["--use-distributed-optimizer"]], ids=["plain", "distributed"])
def test_optimizer_and_schedule_are_those_of_the_flags(
    world_of_one: None, optimizer: list[str], tmp_path: Path
) -> None:
    data = write_tiny_dataset(tmp_path / "tiny", num_documents=12)
    common = [*FLAGS, *optimizer, f"--data-path={data}", "--objective=sft-chosen", "--lr-decay-style=constant"]

    def trainer(*flags: str) -> Trainer:
        config = parse_arguments([*common, *flags]).with_device_defaults("local", "gloo")
        return Trainer(config, PreferenceDataset(data))

    first = trainer("--lr=1e-3", f"--save={tmp_path / 'save'}", "--train-iters=3", "--async-save")
    first._step(next(training_batches(MicroBatches(first.config, first.dataset, None), first._sampler())))
    progress = Progress(iteration=1)
    first.checkpointer.save(progress)
    progress.iteration += 1  # training goes on while the checkpoint is written
    first.checkpointer.finish(blocking=True)
    other = ["--lr=5e-4", "--adam-beta2=0.95", "--adam-eps=1e-6", "--weight-decay=0.3", "--lr-warmup-iters=2"]
    groups = trainer(*other, f"--load={tmp_path / 'save'}", "--train-iters=4").optimizer.param_groups
    assert sorted(group["wd_mult"] for group in groups) == [0.0, 1.0]
    for group in groups:
        # One of two steps of warm-up is done.
        assert (group["lr"], group["max_lr"], group["eps"]) == (2.5e-4, 5e-4, 1e-6)
        assert (tuple(group["betas"]), group["weight_decay"]) == ((0.9, 0.95), 0.3 * group["wd_mult"])


@pytest.mark.parametrize("more", [[], ["--bf16"], ["--sgd-momentum=0"]], ids=["fp32", "bf16", "no momentum"])
def test_sgd_resumes_exactly(world_of_one: None, more: list[str], tmp_path: Path) -> None:
    data = write_tiny_dataset(tmp_path / "tiny", num_documents=12)
    common = [*FLAGS, *more, f"--data-path={data}", "--objective=sft-chosen", "--train-iters=3"]
    common += ["--optimizer=sgd", "--lr=1e-2", "--lr-decay-style=constant", "--lr-warmup-fraction=0"]
    save = str(tmp_path / "save")

    def trainer(*flags: str) -> Trainer:
        config = parse_arguments([*common, *flags]).with_device_defaults("local", "gloo")
        return Trainer(config, PreferenceDataset(data))

    def step(run: Trainer) -> dict[str, float]:
        metrics, _ = run._step(next(training_batches(MicroBatches(run.config, run.dataset, None), run._sampler())))
        return {name: metrics[name] for name in ("loss", "grad_norm", "learning_rate")}

    first = trainer(f"--save={save}", "--no-save-rng")
    first_step = step(first)
    first.checkpointer.save(first.progress)
    expected = [step(first), step(first)]
    assert expected[0]["loss"] < first_step["loss"]
    with pytest.raises(ValueError, match="holds no random states: give --no-load-rng"):
        trainer(f"--load={save}")
    resumed = trainer(f"--load={save}", "--no-load-rng")
    assert [step(resumed), step(resumed)] == expected
