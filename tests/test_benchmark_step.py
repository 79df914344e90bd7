"""The step benchmark on tiny sizes: one loss for all variants, JSON on the last line, ratios the right way up."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.step.case import StepCase, write_files
from benchmarks.step.measure import Measurement
from benchmarks.step.run import main
from benchmarks.step.summary import LM_HEAD_KEY, circumstances, markdown, replace_section, summarize, table
from tests.training.commands import REPOSITORY, environment

TINY = StepCase(
    prefix_tokens=40,
    response_tokens=5,
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    vocab_size=64,
)
FLAGS = [
    f"--{name.replace('_', '-')}={value}"
    for name, value in dataclasses.asdict(TINY).items()
    if name not in ("device", "bf16", "seed")
]
ALL_IN_ONE_PROCESS = """
import json, sys
from pathlib import Path
from benchmarks.step.case import StepCase
from benchmarks.step.measure import measure
case = StepCase(**json.loads(sys.argv[2]))
# TRL first: it would join the process group that the others make.
for variant in ("trl", "shared_prefix_dpo", "two_sequences_full_logits", "shared_prefix"):
    result = measure(variant, Path(sys.argv[1]), 2, case, lambda line: None)
    print("LOSSES", json.dumps([variant, result.losses]))
"""


@pytest.mark.slow
def test_last_line_is_the_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    variants = ["--variants", "shared_prefix", "two_sequences"]
    assert main([*FLAGS, *variants, "--rounds=1", "--steps=2", "--json"]) == 0
    output = capsys.readouterr().out
    result = json.loads(output.splitlines()[-1])
    assert result["speedup_vs_two_sequences"] > 0
    assert result["memory_ratio_vs_two_sequences"] > 0
    # Equal losses are required on the way: `test_different_losses_are_an_error`.
    assert set(result["variants"]) == {"shared_prefix", "two_sequences"}
    assert "x faster" in output and result["time"] == "CPU time of the process"


@pytest.mark.slow
def test_variants_compute_the_same_loss(tmp_path: Path) -> None:
    write_files(TINY, tmp_path)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ALL_IN_ONE_PROCESS, tmp_path, json.dumps(dataclasses.asdict(TINY))],
        env=environment() | {"LONGPO_USE_CPU": "1", "HF_HOME": str(tmp_path)},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"exit code {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    losses = dict(json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("LOSSES"))
    # Two steps: the second shows that the gradients and the optimizers agree too, since a step changes these losses by
    # 4e-5 and 8e-6. Rounding makes 1e-7, whatever the instruction set, the number of threads or the load.
    assert losses["shared_prefix_dpo"] == pytest.approx(losses["trl"], rel=1e-6)
    assert abs(losses["trl"][0] - 0.6931) > 0.05, "the loss of equal policy and reference would compare nothing"
    assert losses["two_sequences_full_logits"] == pytest.approx(losses["shared_prefix"], rel=1e-6)
    assert losses["shared_prefix"][1] < losses["shared_prefix"][0]


def measured(step_s: float, peak_gib: float, loss: float = 2.0, **changes: Any) -> Measurement:
    """A process whose first step, a warm-up, took very long, and whose last one was disturbed."""
    times = [99.0, step_s, 1.5 * step_s]
    return Measurement(
        **{"losses": [loss], "wall_s": times, "cpu_s": times, "idle_gib": 0.3, "peak_gib": peak_gib} | changes
    )


def test_ratios() -> None:
    runs = {
        "shared_prefix": [measured(1.5, 0.6), measured(1.0, 0.5)],
        "two_sequences": [measured(2.0, 1.0), measured(2.5, 1.0, wall_s=[1.0, 9.0])],
        "shared_prefix_dpo": [measured(0.5, 0.5, loss=0.5)],
        "trl": [measured(2.0, 2.0, loss=0.5)],
        "lm_head": [measured(1.0, 0.5)],
    }
    result = summarize(StepCase(), runs, by_cpu_time=True)
    assert result["speedup_vs_two_sequences"] == 2.0
    assert result["memory_ratio_vs_two_sequences"] == 0.5
    assert result["speedup_vs_trl"] == 4.0
    assert result["memory_ratio_vs_trl"] == 0.25
    assert result[LM_HEAD_KEY] == 0.5 - 32768 * 256 * 4 / 2**30
    assert result["variants"]["shared_prefix"]["tokens_per_s"] == 2 * (8192 + 128)
    text = table(result)
    assert "2.00x faster (target at least 1.8: met), 0.50x the peak memory (target at most 0.65: met)" in text
    assert "target" not in table(summarize(TINY, runs, by_cpu_time=True))
    page = markdown([result], circumstances(1, by_cpu_time=True), "a machine")
    assert "| shared prefix against two sequences | 8,192 | 128 | 1 | 2.00 | 0.50x |" in page
    assert "a machine, 1 thread, CPU time" in page and "commit" in page


def test_different_losses_are_an_error() -> None:
    runs = {"shared_prefix": [measured(1.0, 1.0)], "two_sequences": [measured(1.0, 1.0, loss=2.001)]}
    with pytest.raises(ValueError, match="they do not compute the same"):
        summarize(StepCase(), runs, by_cpu_time=True)


def test_docs_section_is_replaced_between_its_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- benchmark_step cpu -->\nold\n<!-- end of benchmark_step cpu -->\nbelow\n")
    replace_section(page, "cpu", "new")
    assert page.read_text() == ("above\n<!-- benchmark_step cpu -->\nnew\n<!-- end of benchmark_step cpu -->\nbelow\n")
    with pytest.raises(ValueError, match="has no lines '<!-- benchmark_step cuda -->'"):
        replace_section(page, "cuda", "new")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prefix-tokens=0"], "--prefix-tokens 0 must be at least 1"),
        (["--num-query-groups=3"], "--num-attention-heads 8 must be a multiple of --num-query-groups 3"),
        (["--bf16"], "--bf16 is for --device cuda"),
        (["--steps=0"], "--steps 0 must be at least 1"),
    ],
)
def test_impossible_flags(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 1
    assert message in capsys.readouterr().err
