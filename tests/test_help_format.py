"""Help screens fit a terminal of 80 columns and show defaults."""

from __future__ import annotations

import argparse
import importlib
import sys

import pytest

from megatron_longpo.help_format import HelpFormatter, at_least_1

PROGRAMS = [
    "tools.benchmark_step",
    "tools.compute_reference_logprobs",
    "tools.convert_checkpoint",
    "tools.convert_checkpoint hf-to-megatron",
    "tools.convert_checkpoint megatron-to-hf",
    "tools.convert_checkpoint verify",
    "tools.generate_pairs",
    "tools.import_pairs",
    "tools.inspect_pairs",
    "tools.plan_run",
    "tools.plot_metrics",
    "tools.preprocess_pairs",
    "benchmarks.generation.chat_server",
    "benchmarks.gpu.__main__",
    "benchmarks.memory",
    "benchmarks.suite",
    "examples.export.quantize",
    "examples.quickstart.run",
    "pretrain_longpo",
]
THAT_IMPORT_MUCH = ["tools.benchmark_conversion", "tools.benchmark_generation", "megatron_longpo.planning.published"]


@pytest.mark.parametrize(
    "program", [*PROGRAMS, *(pytest.param(name, marks=pytest.mark.slow) for name in THAT_IMPORT_MUCH)]
)
def test_a_help_screen_fits_80_columns(
    program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *command = program.split()
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", [name, *command, "--help"])
    module = importlib.import_module(name)
    with pytest.raises(SystemExit) as ended:
        module.run_command(lambda config, dataset: None) if hasattr(module, "run_command") else module.main()
    lines = capsys.readouterr().out.splitlines()
    assert not ended.value.code and len(lines) > 4
    assert not [line for line in lines if len(line) > 80]


def test_paragraphs_are_wrapped_and_commands_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "42")
    command = "    python tools/a_tool.py --some-flag 1 \\\n        --another-flag 2"
    text = f"Words in one paragraph of two\nlines, for a-hyphened-value.\n\n{command}\n"
    parser = argparse.ArgumentParser("a", description=text, formatter_class=HelpFormatter)
    parser.add_argument("--number", type=int, default=3, help="a number")
    parser.add_argument("--said", default="x", help="default: of its own")
    parser.add_argument("--switch", action="store_true", help="a switch")
    parser.add_argument("--none", help="nothing")
    shown = parser.format_help()
    assert f"\nWords in one paragraph of two lines, for\na-hyphened-value.\n\n{command}\n\n" in shown
    assert "a number (default: 3)" in shown and shown.count("default") == 2


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "", "x", "²"])
def test_a_number_below_1_is_named(text: str) -> None:
    assert at_least_1("7") == 7
    with pytest.raises(argparse.ArgumentTypeError, match="must be a whole number of at least 1"):
        at_least_1(text)
