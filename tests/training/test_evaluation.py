"""Evaluation on the held-out split, and where its numbers go."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.tiny import write_tiny_dataset
from tests.training.commands import metrics, train

# 3 of 10 documents are held out: a number that neither batches nor ranks divide.
FLAGS = ["--split=70,30", "--train-iters=2", "--eval-interval=1", "--eval-iters=5", "--lr=1e-3", "--log-interval=2"]


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
