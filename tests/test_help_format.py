"""Help screens fit a terminal of 80 columns and show defaults."""

from __future__ import annotations

import argparse
import importlib
import sys

import pytest

from megatron_longpo.help_format import HelpFormatter, at_least_1, number_above_0, number_at_least_0

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
    "tools.lengthen_model",
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


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "-1", "", "x", "0"])
def test_a_number_out_of_range_is_named(text: str) -> None:
    assert number_above_0("0.5") == number_at_least_0("0.5") == 0.5 and number_at_least_0("0") == 0
    with pytest.raises(argparse.ArgumentTypeError, match="must be a finite number greater than 0"):
        number_above_0(text)
    if text != "0":
        with pytest.raises(argparse.ArgumentTypeError, match="must be a finite number of at least 0"):
            number_at_least_0(text)


@pytest.mark.parametrize(
    ("program", "flags"),
    [
        ("benchmarks.generation.chat_server", "--latency-ms nan"),
        ("benchmarks.gpu.__main__", "--minutes inf"),
        ("benchmarks.gpu.__main__", "--peak-tflops nan"),
        ("examples.export.quantize", "--hf-model x --data-path x --save x --max-tokens 0"),
        ("examples.export.quantize", "--hf-model x --data-path x --save x --num-samples -1"),
        pytest.param("tools.benchmark_conversion", "--gigabytes nan", marks=pytest.mark.slow),
        pytest.param("tools.benchmark_generation", "--latency-ms inf", marks=pytest.mark.slow),
    ],
)
def test_a_flag_out_of_range_is_an_error_before_any_work(
    program: str, flags: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [program, *flags.split()])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(program).main()
    flag, value = flags.split()[-2:]
    assert ended.value.code == 2 and f"argument {flag}: '{value}' must be a" in capsys.readouterr().err
