"""What the flags of the learning rate's and the weight decay's schedule make of them, step by step."""

from __future__ import annotations

import pytest
import torch

from megatron_longpo.arguments import parse_arguments
from megatron_longpo.training.optimizer import build_scheduler

SAMPLES = 80
BATCH = 8


def course(words: str, key: str) -> list[float]:
    """A value of the parameter group before each of ten steps, and behind the last."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    config = parse_arguments([f"--global-batch-size={BATCH}", "--lr=1", *words.split()])
    scheduler = build_scheduler(config, optimizer, SAMPLES)  # type: ignore[arg-type]
    values = [optimizer.param_groups[0][key]]
    for _ in range(SAMPLES // BATCH):
        scheduler.step(BATCH)
        values.append(optimizer.param_groups[0][key])
    return values


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--train-iters 10 --lr-warmup-iters 2 --lr-decay-style constant", [0, 0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        (
            "--train-iters 10 --lr-warmup-iters 5 --lr-warmup-init 0.5 --lr-decay-style linear",
            [0.5, 0.6, 0.7, 0.8, 0.9, 1, 0.8, 0.6, 0.4, 0.2, 0],
        ),
        (
            "--train-samples 80 --lr-warmup-samples 16 --lr-decay-style linear --lr-decay-samples 48 --min-lr 0.2",
            [0, 0.5, 1, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2, 0.2, 0.2],
        ),
        (
            "--train-iters 10 --lr-warmup-fraction 0 --lr-decay-iters 4",
            [1, 0.853553, 0.5, 0.146447, 0, 0, 0, 0, 0, 0, 0],
        ),
        (
            "--train-iters 10 --lr-warmup-iters 2 --lr-decay-style WSD --lr-wsd-decay-iters 4 "
            "--lr-wsd-decay-style linear",
            [0, 0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0],
        ),
        (
            "--train-samples 80 --lr-warmup-samples 0 --lr-decay-style WSD --lr-wsd-decay-samples 32 "
            "--lr-wsd-decay-style cosine",
            [1, 1, 1, 1, 1, 1, 1, 0.853553, 0.5, 0.146447, 0],
        ),
    ],
)
def test_learning_rate(words: str, expected: list[float]) -> None:
    assert course(words, "lr") == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--weight-decay 0.3", [0.3] * 11),
        ("--weight-decay-incr-style linear --start-weight-decay 0.1 --end-weight-decay 0.3", [0.1, 0.2, 0.3]),
        ("--weight-decay-incr-style cosine --start-weight-decay 0 --end-weight-decay 0.2", [0, 0.1, 0.2]),
    ],
)
def test_weight_decay(words: str, expected: list[float]) -> None:
    values = course(f"--train-iters 10 {words}", "weight_decay")
    assert values[:: 10 // (len(expected) - 1)] == pytest.approx(expected)


def test_a_schedule_that_is_all_warm_up_is_refused() -> None:
    with pytest.raises(ValueError, match="would warm up for 72 samples of a schedule of 72: lower --lr"):
        course("--train-iters 10 --lr-decay-iters 9 --lr-warmup-fraction 0.999", "lr")
