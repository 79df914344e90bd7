"""Evaluation on the held-out split, and where its numbers go."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_longpo.arguments import parse_arguments
from megatron_longpo.data.dataset import PreferenceDataset
from megatron_longpo.model.build import build_model, wrap_for_training
from megatron_longpo.training.data import MicroBatches, evaluation_batches
from megatron_longpo.training.evaluation import evaluate
from tests.tiny import write_tiny_dataset
from tests.training.commands import FLAGS as COMMON
from tests.training.commands import metrics, train

# 3 of 10 documents are held out: a number that neither batches nor ranks divide.
FLAGS = ["--split=70,30", "--train-iters=2", "--eval-interval=1", "--eval-iters=5", "--lr=1e-3", "--log-interval=2"]


@pytest.mark.parametrize("row", [1, 2])
def test_the_mean_is_that_of_every_document_alone(world_of_one: None, tmp_path: Path, row: int) -> None:
    data = write_tiny_dataset(tmp_path / "tiny", num_documents=5)
    flags = [*COMMON, f"--data-path={data}", "--objective=sft-chosen", "--train-iters=1", f"--micro-batch-size={row}"]
    config = parse_arguments(flags).with_device_defaults("local", "gloo")
    chunks = wrap_for_training(config, build_model(config))
    micro_batches = MicroBatches(config, PreferenceDataset(data), None)
    alone = [evaluate(config, chunks, micro_batches, [number])["loss"] for number in range(5)]
    assert len(set(alone)) == 5
    assert evaluate(config, chunks, micro_batches, list(range(5)))["loss"] == pytest.approx(sum(alone) / 5, rel=1e-6)
    groups = [group.micro_batches for group, _ in evaluation_batches(micro_batches, list(range(5)))]
    assert {len(batch.layout.documents) for group in groups for batch in group} == {row}
    assert all(chunk.training for chunk in chunks), "activations are recomputed in training only"


@pytest.mark.slow
def test_held_out_documents_count_once_each_on_any_number_of_ranks(tmp_path: Path) -> None:
    data = f"--data-path={write_tiny_dataset(tmp_path / 'tiny', num_documents=10)}"
    runs = {}
    for name, ranks in (("one", 1), ("two", 2)):
        folder = tmp_path / name
        outputs = [f"--metrics-jsonl={folder}.jsonl", f"--tensorboard-dir={folder}", f"--reference-dir={folder}"]
        train(data, *FLAGS, *outputs, ranks=ranks)  # data-parallel ranks draw the same random weights
        lines = metrics(Path(f"{folder}.jsonl"))
        assert [line["iteration"] for line in lines] == [1, 2, 2]  # evaluation, training, evaluation
        runs[name] = [{k: v for k, v in line.items() if k.startswith("eval/")} for line in lines if "eval/loss" in line]
        events = EventAccumulator(str(folder)).Reload()
        assert {"loss", "rewards/margins", "eval/loss"} <= set(events.Tags()["scalars"])
        assert [event.step for event in events.Scalars("eval/loss")] == [1, 2]
    for one, two in zip(runs["one"], runs["two"], strict=True):
        assert two == pytest.approx(one, rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_evaluation_alone_says_what_training_said_and_changes_nothing(tmp_path: Path) -> None:
    save, path = tmp_path / "save", tmp_path / "metrics.jsonl"
    data = f"--data-path={write_tiny_dataset(tmp_path / 'tiny', num_documents=10)}"
    sharded = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
    common = [data, *FLAGS, *sharded, f"--metrics-jsonl={path}", f"--load={save}", f"--save={save}"]
    train(*common, "--skip-train", ranks=2)
    assert not list(save.glob("iter_*"))
    train(*common, ranks=2)
    trained = metrics(path)
    # The model before training is the first point of the curve.
    assert [line["iteration"] for line in trained] == [0, 1, 2, 2]
    assert trained[0]["eval/loss"] != trained[1]["eval/loss"] != trained[-1]["eval/loss"]
    train(*common, "--skip-train", ranks=2)
    *before, again = metrics(path)
    assert before == trained and again == trained[-1]
    assert [folder.name for folder in save.glob("iter_*")] == ["iter_0000002"]
