"""Predictions beside publications."""

from __future__ import annotations

from megatron_longpo.planning.hardware import H100
from megatron_longpo.planning.published import (
    llama3_pretraining,
    longpo_paper,
    nemo_long_sequences,
    nemo_on_b200,
    torchtitan,
)


def test_predictions_of_published_runs_stay_as_near_as_the_documentation_says() -> None:
    flash = H100.attention_tflops
    assert [round(c.ratio, 2) for c in longpo_paper()] == [0.85, 1.04, 0.84]
    assert [round(c.ratio, 2) for c in nemo_long_sequences(flash)] == [1.11, 1.11, 1.05, 1.06, 1.05, 1.03, 1.05]
    assert [round(c.ratio, 2) for c in nemo_on_b200()] == [1.33, 1.28, 1.29, 1.25, 1.2, 1.16, 1.14, 1.15]
    assert [round(c.ratio, 2) for c in llama3_pretraining(flash)] == [1.07, 1.05, 0.82]
    assert [round(c.ratio, 2) for c in torchtitan(flash)] == [1.42, 1.33, 1.77, 1.85, 1.11, 1.38, 1.44, 1.71]
