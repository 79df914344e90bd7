"""What one report says of several steps."""

from __future__ import annotations

import math

from megatron_longpo.training.reporting import interval_means


def step(loss: float, seconds: float, num_tokens: float, rate: float = 0.0) -> dict[str, float]:
    return {
        "loss": loss,
        "grad_norm": loss / 2,
        "learning_rate": rate,
        "iteration_time_s": seconds,
        "tokens_per_s_per_gpu": num_tokens / seconds,
        "peak_memory_gib": 10.0 * rate,
    }


def test_skipped_steps_do_not_hide_the_losses_of_the_others() -> None:
    steps = [(step(2.0, 1.0, 100), False), (step(math.nan, 3.0, 100), True), (step(4.0, 2.0, 100, rate=0.5), False)]
    means = interval_means(steps)
    assert (means["loss"], means["grad_norm"]) == (3.0, 1.5)
    assert (means["learning_rate"], means["peak_memory_gib"]) == (0.5, 5.0)
    assert means["iteration_time_s"] == 2.0
    assert math.isnan(interval_means(steps[1:2])["loss"])


def test_rates_are_those_of_the_whole_interval() -> None:
    """The mean of 100 and 10 tokens/s would be 55."""
    steps = [(step(1.0, 1.0, 100), False), (step(1.0, 10.0, 100), False)]
    assert interval_means(steps)["tokens_per_s_per_gpu"] == 200 / 11
