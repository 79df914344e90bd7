"""The learning rates and weight decays that flags ask for, step by step."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_longpo.arguments import parse_arguments
from megatron_longpo.training.optimizer import build_scheduler

BATCH, STEPS = 4, 20


def cosine(share: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * share))


SCHEDULES = {
    # The paper's: 10 % warm-up, then half a cosine down to nothing at the end of the run.
    "": [*(step / 2 for step in range(2)), *(cosine((step - 2) / 18) for step in range(2, 20))],
    "--lr-warmup-fraction=0": [cosine(step / 20) for step in range(20)],
    "--lr-warmup-iters=4": [*(step / 4 for step in range(4)), *(cosine((step - 4) / 16) for step in range(4, 20))],
    "--lr-warmup-samples=16 --lr-warmup-init=0.5": [
        *(0.5 + 0.5 * step / 4 for step in range(4)),
        *(cosine((step - 4) / 16) for step in range(4, 20)),
    ],
    "--lr-decay-iters=10 --lr-decay-style=linear --min-lr=0.5": [
        0.0,
        *(0.5 + 0.5 * (1 - (step - 1) / 9) for step in range(1, 10)),
        *(0.5 for _ in range(10)),
    ],
    "--lr-decay-samples=40 --lr-warmup-fraction=0.2": [
        *(step / 2 for step in range(2)),
        *(cosine((step - 2) / 8) for step in range(2, 10)),
        *(0.0 for _ in range(10)),
    ],
    "--lr-decay-style=constant": [0.0, 0.5, *(1.0 for _ in range(18))],
    "--lr-decay-style=WSD --lr-wsd-decay-iters=5 --lr-wsd-decay-style=linear": [
        *(0.0, 0.5, *(1.0 for _ in range(13))),
        *(1 - step / 5 for step in range(5)),
    ],
    "--lr-warmup-samples=0 --lr-decay-style=WSD --lr-wsd-decay-samples=16 --lr-wsd-decay-style=cosine": [
        *(1.0 for _ in range(16)),
        *(cosine(step / 4) for step in range(4)),
    ],
}


def steps(flags: str) -> list[tuple[float, float]]:
    """Learning rate and weight decay of every step of a run."""
    length = f"--train-samples={BATCH * STEPS}" if "samples" in flags else f"--train-iters={STEPS}"
    config = parse_arguments(["--lr=1", f"--global-batch-size={BATCH}", length, *flags.split()])
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    scheduler = build_scheduler(config, optimizer, BATCH * STEPS)  # type: ignore[arg-type]
    taken = []
    for _ in range(STEPS):
        (group,) = optimizer.param_groups
        taken.append((group["lr"], group["weight_decay"]))
        scheduler.step(increment=BATCH)
    return taken


@pytest.mark.parametrize("flags", SCHEDULES)
def test_learning_rates(flags: str) -> None:
    assert [rate for rate, _ in steps(flags)] == pytest.approx(SCHEDULES[flags], abs=1e-12)


def test_weight_decay_is_constant_or_grows_over_the_run() -> None:
    assert {decay for _, decay in steps("--weight-decay=0.3")} == {0.3}
    growing = "--start-weight-decay=0.1 --end-weight-decay=0.5 --lr-decay-iters=10 --weight-decay-incr-style="
    expected = [0.1 + 0.4 * step / STEPS for step in range(STEPS)]
    assert [decay for _, decay in steps(f"{growing}linear")] == pytest.approx(expected)
    expected = [0.5 - 0.4 * cosine(step / STEPS) for step in range(STEPS)]
    assert [decay for _, decay in steps(f"{growing}cosine")] == pytest.approx(expected)


def test_a_schedule_that_is_all_warm_up_is_refused() -> None:
    with pytest.raises(ValueError, match="would warm up for 36 samples of a schedule of 36: lower --lr"):
        steps("--lr-decay-iters=9 --lr-warmup-fraction=0.999")
