"""``--profile``: a trace with every stage, forward and backward, and shares that add up; and a step's times."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from megatron_longpo.arguments import parse_arguments
from megatron_longpo.data.dataset import PreferenceDataset
from megatron_longpo.ranges import BRANCH_ATTENTION, COMM, DATA, LM_HEAD, LOSS, MLP, OPTIMIZER, PREFIX_ATTENTION, STAGES
from megatron_longpo.training.distributed import initialize, shut_down
from megatron_longpo.training.loop import Trainer
from megatron_longpo.validation import validate
from tests.tiny import MODEL_FLAGS, write_tiny_dataset
from tests.training.commands import metrics

FLAGS = [
    "--global-batch-size=2",
    "--train-iters=3",
    "--num-layers=1",
    "--seq-length=512",
    "--num-workers=0",
    "--progress-bar=off",
]
FLAGS += ["--split=100,0", "--objective=sft-chosen", "--lr-decay-style=constant", "--lr-warmup-fraction=0"]
PROFILE = ["--profile", "--profile-step-start=1", "--profile-step-end=2"]
RECOMPUTE = ["--recompute-granularity=full", "--recompute-method=uniform", "--recompute-num-layers=1"]


def train(tmp_path: Path, flags: list[str]) -> list[dict[str, float]]:
    data = write_tiny_dataset(tmp_path / "tiny")
    path = tmp_path / "metrics.jsonl"
    config = parse_arguments([*MODEL_FLAGS, *FLAGS, f"--data-path={data}", f"--metrics-jsonl={path}", *flags])
    config = config.with_device_defaults("local", "gloo")
    validate(config, 1)
    initialize(config)
    try:
        Trainer(config, PreferenceDataset(data, config.model.vocab_size)).train()
    finally:
        shut_down()
    return metrics(path)


def test_trace_table_and_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = train(tmp_path, [*PROFILE, f"--profile-dir={tmp_path}", *RECOMPUTE])
    assert [step["iteration"] for step in steps] == [1, 2, 3]
    for step in steps:
        parts = step["forward_backward_time_s"] + step["optimizer_time_s"]
        assert 0 < step["optimizer_time_s"] < step["forward_backward_time_s"]
        assert parts == pytest.approx(step["iteration_time_s"])
        assert step["data_time_s"] > 0

    trace = json.loads((tmp_path / "rank-0-steps-2-2.pt.trace.json").read_text())
    counts = Counter(event["name"] for event in trace["traceEvents"] if event.get("cat") == "user_annotation")
    micro_batches = 2
    assert counts["step"] == counts[OPTIMIZER] == 1
    assert counts[DATA] == 1 + micro_batches
    assert counts[LOSS] == counts[LM_HEAD] == 2 * micro_batches, "forward and backward"
    assert counts[MLP] == 3 * micro_batches, "forward, recomputed, backward"
    # One causal square of the prefix; a rectangle on it and a causal square of the one branch.
    assert counts[PREFIX_ATTENTION] == 3 * micro_batches
    assert counts[BRANCH_ATTENTION] == 2 * counts[PREFIX_ATTENTION]
    assert counts[COMM] > 0

    table = capsys.readouterr().out
    shares = {name: float(share) for name, share in re.findall(r"^(.+?) +[\d.]+ +([\d.]+)%$", table, re.MULTILINE)}
    assert set(STAGES) < set(shares) and len(shares) == len(STAGES) + 1
    assert sum(shares.values()) == pytest.approx(100, abs=0.5)
    assert all(shares[name] > 0 for name in (PREFIX_ATTENTION, BRANCH_ATTENTION, MLP, LM_HEAD, LOSS, OPTIMIZER))
