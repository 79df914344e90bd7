"""The benchmarks of conversion and generation, whole but small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import conversion
from benchmarks.generation import run as generation


@pytest.mark.slow
def test_generation_counts_requests_in_flight_and_the_gain_of_one_prefill(tmp_path: Path) -> None:
    words = "--num-documents 20 --concurrency 8 --latency-ms 20 --document-tokens 256"
    generation.main([*words.split(), f"--results={tmp_path}"])
    result = json.loads((tmp_path / "generation.json").read_text())
    overhead = result["overhead"]
    assert overhead["num_requests"] >= 20 * (1 + 2 * 4) and 1 < overhead["mean_in_flight"] <= 8
    assert overhead["overhead"] == pytest.approx(1 - overhead["mean_in_flight"] / 8)
    assert result["shared_prefill"]["times_faster"] > 1 and result["versions"]["datatrove"]


@pytest.mark.slow
def test_conversion_there_and_back_is_measured_and_compared(tmp_path: Path) -> None:
    words = ["--gigabytes=0.1", "--rounds=1", f"--folder={tmp_path}", f"--results={tmp_path}"]
    assert conversion.main(words) == 0
    result = json.loads((tmp_path / "conversion.json").read_text())
    assert result["bit_identical"] and result["within_bound"] and len(result["steps"]) == 3
    assert 0.9 < result["checkpoint_gb"] < 1 and all(step["peak_rss_gb"] > 0.1 for step in result["steps"])
    assert [path.name for path in tmp_path.iterdir()] == ["conversion.json"]
