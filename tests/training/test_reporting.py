"""What one report says of several steps, and the file that gets it."""

from __future__ import annotations

import math
import resource
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_longpo.arguments import parse_arguments
from megatron_longpo.training.outputs import check_outputs
from megatron_longpo.training.reporting import Reporter, interval_means
from tests.training.commands import metrics


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


def test_a_resumed_file_is_json_and_has_every_step_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"iteration": 1, "loss": NaN}\n{"iteration": 2, "loss": null}\n{"iteration": 3, "loss": 1.0}\n{"it'
    )
    reporter = Reporter(parse_arguments([f"--metrics-jsonl={path}"]), active=True, total_steps=4, first_step=2)
    reporter.report({"iteration": 3, "consumed_samples": 24, "loss": math.inf})
    reporter.close()
    losses = [(row["iteration"], row["loss"]) for row in metrics(path)]
    assert losses == [(1, None), (2, None), (3, None)]


@pytest.mark.parametrize(
    "end", [b'{"iter', b'{"iteration": 3, "loss": 0.\0\0\0', b"\0\0\0", b'{"iteration": 3, "\xe2\x82']
)
def test_a_line_that_a_kill_or_a_power_cut_tore_is_left_out(tmp_path: Path, end: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    line = b'{"iteration": 1, "loss": 0.5}\n'
    path.write_bytes(line + end)
    config = parse_arguments([f"--metrics-jsonl={path}"])
    check_outputs(config)
    Reporter(config, active=True, total_steps=4, first_step=3).close()
    assert path.read_bytes() == line


def test_tensorboard_has_every_step_of_a_resumed_run_once(tmp_path: Path) -> None:
    config = parse_arguments([f"--tensorboard-dir={tmp_path}"])
    for first_step, losses in ((0, [5.0, 4.0, 3.0]), (2, [2.0, 1.0])):
        reporter = Reporter(config, active=True, total_steps=4, first_step=first_step)
        for step, loss in enumerate(losses, first_step + 1):
            reporter.report({"iteration": step, "consumed_samples": 8 * step, "loss": loss})
        reporter.report({"iteration": first_step + 2, "consumed_samples": 8, "loss": 9.0}, prefix="eval/")
        reporter.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 5.0), (2, 4.0), (3, 2.0), (4, 1.0)]
    assert [event.step for event in events.Scalars("eval/loss")] == [2, 4]


def test_the_progress_bar_goes_on_where_the_run_does(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, bar in ((["--progress-bar=on"], True), (["--progress-bar=off"], False), ([], False)):
        reporter = Reporter(parse_arguments(flags), active=True, total_steps=4, first_step=2)
        reporter.step_done()
        reporter.report({"iteration": 3, "consumed_samples": 24, "loss": 0.25})
        reporter.report({"iteration": 3, "consumed_samples": 24, "loss": 9.0}, prefix="eval/")
        reporter.close()
        output = capsys.readouterr()
        assert ("3/4" in output.err and "loss 0.2500" in output.err) == bar, "none where nobody looks at it"
        assert f" iteration {3:8d}/{4:8d} | consumed samples" in output.out


def test_a_disk_without_room_for_metrics_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    reporter = Reporter(parse_arguments([f"--metrics-jsonl={path}"]), active=True, total_steps=4, first_step=0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        for act in (lambda: reporter.report({"iteration": 1, "consumed_samples": 8, "loss": 1.0}), reporter.close):
            with pytest.raises(OSError, match=f"File too large: '{path}'"):
                act()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_an_evaluation_alone_removes_no_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1, "loss": 2.0}\n{"iteration": 2, "loss": 1.0}\n')
    config = parse_arguments([f"--metrics-jsonl={path}", "--skip-train"])
    Reporter(config, active=True, total_steps=2, first_step=1).close()
    assert [row["iteration"] for row in metrics(path)] == [1, 2]


def test_what_wandb_needs_is_found_missing_before_the_model_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # what Python does with a package that is not there
    with pytest.raises(ValueError, match=r"--wandb-project needs wandb: pip install 'megatron_longpo\[wandb\]'"):
        check_outputs(parse_arguments(["--wandb-project=longpo"]))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--wandb-save-dir .*file is a file"):
        check_outputs(parse_arguments(["--wandb-project=longpo", f"--wandb-save-dir={tmp_path / 'file'}"]))


def test_a_resumed_run_goes_on_in_its_wandb_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    save = tmp_path / "save"
    flags = ["--wandb-project=longpo", f"--save={save}"]

    def run_id(first_step: int, *more: str) -> str:
        reporter = Reporter(parse_arguments([*flags, *more]), active=True, total_steps=4, first_step=first_step)
        reporter.report({"iteration": first_step + 1, "consumed_samples": 8, "loss": 1.0})
        reporter.close()
        return reporter.wandb.id

    begun = run_id(0, f"--load={save}")
    assert run_id(2, f"--load={save}") == begun
    # An evaluation alone, and a run that goes back to an earlier step, have values for steps that the run has.
    assert run_id(2, f"--load={save}", "--skip-train") != begun
    assert run_id(2, f"--load={save}") == begun
    back = run_id(1, f"--load={save / 'iter_0000001'}")
    assert back != begun and run_id(2, f"--load={save}") == back
    assert run_id(0, f"--load={save}") not in (begun, back)
