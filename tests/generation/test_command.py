"""The command line: what it refuses, and how it says so."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from loguru import logger

from megatron_longpo.generation.command import main
from megatron_longpo.generation.flags import make_parser
from megatron_longpo.generation.logs import log_to
from megatron_longpo.generation.settings import GenerationSettings

OPENAI = ["--engine", "openai", "--model", "m", "--base-url", "http://127.0.0.1:9/v1", "--tokenizer-model", "DIR"]
EMBEDDED = ["--engine", "transformers", "--model", "m"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--engine", "openai", "--model", "m"], "--engine openai needs --base-url, such as http://127.0.0.1:8000/v1"),
        ([*OPENAI[:-2]], "needs --tokenizer-model DIR, the model's tokenizer"),
        ([*OPENAI, "--base-url", "127.0.0.1:8000"], "--base-url '127.0.0.1:8000' must be an address such as http://"),
        (
            [*OPENAI, "--base-url", "http://me:secret@host/v1"],
            "--base-url carries a user name, password or query: give",
        ),
        (
            [*OPENAI, "--long-rotary-base", "1e7"],
            "(python tools/lengthen_model.py … --rotary-base 1e+07), serve that too, and give its address as "
            "--long-base-url",
        ),
        (
            [*OPENAI, "--batch-size", "4", "--dtype", "bf16"],
            "--dtype bf16, --batch-size 4 have no effect with --engine openai, only with --engine transformers: leave",
        ),
        (
            [*EMBEDDED, "--base-url", "http://me:secret@h/v1"],
            "--base-url has no effect with --engine transformers, only with --engine openai: leave it out",
        ),
        (
            [*OPENAI, "--chat-template", "chat.jinja"],
            "--chat-template chat.jinja has no effect with --engine openai, only with --engine transformers: leave it "
            "out. The server renders it: give it there (vllm serve … --chat-template FILE)",
        ),
        ([*EMBEDDED, "--max-repetition", "0.4", "--filters", "length"], "--max-repetition 0.4 has no effect without"),
        (
            [*EMBEDDED, "--min-chunk-tokens", "9", "--max-chunk-tokens", "8"],
            "--min-chunk-tokens 9 is greater than --max-",
        ),
        ([*EMBEDDED, "--max-chunk-tokens", "40000"], "--max-chunk-tokens 40000 must be at most 32768"),
        ([*EMBEDDED, "--target-length", "100"], "--min-document-tokens 65536 is greater than --target-length 100"),
        ([*EMBEDDED, "--temperature", "nan"], "--temperature nan must be at least 0"),
        ([*OPENAI, "--request-timeout-s", "inf"], "--request-timeout-s inf must be a number greater than 0"),
        ([*OPENAI, "--request-timeout-s", "nan"], "--request-timeout-s nan must be a number greater than 0"),
        ([*EMBEDDED, "--long-rotary-base", "0"], "--long-rotary-base 0.0 must be a number greater than 1"),
        ([*EMBEDDED, "--top-p", "0"], "--top-p 0.0 must be in (0, 1]"),
        ([*OPENAI, "--concurrency", "0"], "--concurrency 0 must be at least 1"),
        ([*EMBEDDED, "--filters", "refusals"], "--filters refusals: unknown; choose among refusal, repetition, length"),
        ([*EMBEDDED, "--prompt-template", "{document}"], "--prompt-template '{document}' must contain {instruction}"),
        ([*EMBEDDED, "--tasks", "2", "--task", "2"], "--task 2 must be at least 0 and less than --tasks 2"),
    ],
)
def test_flags_that_cannot_work(flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "out"
    assert main(["--documents", "x.jsonl", "--output", str(output), *flags]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("generate_pairs.py: error: ")
    assert message in stderr
    assert "secret" not in stderr
    assert not output.exists()


@pytest.mark.parametrize(("engine", "other"), [(OPENAI, "transformers"), (EMBEDDED, "openai")])
def test_every_flag_of_another_engine_is_refused_also_with_its_default(
    engine: list[str], other: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (group,) = (group for group in make_parser()._action_groups if (group.title or "").startswith(f"--engine {other}"))
    assert len(group._group_actions) > 4
    for action in group._group_actions:
        (flag,) = action.option_strings
        default = getattr(GenerationSettings, action.dest)
        value = default or (action.choices or ["9"])[0]
        words = [flag] if action.nargs == 0 else [flag, str(value)]
        assert main(["--documents", "x.jsonl", "--output", str(tmp_path / "out"), *engine, *words]) == 2
        assert f" {flag}" in (said := capsys.readouterr().err) and f"only with --engine {other}" in said


def test_files_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    documents = tmp_path / "documents.jsonl"
    flags = ["--documents", str(documents), "--output", str(tmp_path / "out"), *EMBEDDED]
    assert main(flags) == 1
    assert f"--documents {documents}: there is no such file or folder" in capsys.readouterr().err
    documents.write_text('{"text": "words"}\n')
    assert main([*flags, "--instruction-template", str(tmp_path / "none")]) == 1
    assert "--instruction-template" in capsys.readouterr().err
    template = tmp_path / "template.txt"
    template.write_text("Say something about {chunk}.")
    assert main([*flags, "--instruction-template", str(template)]) == 1
    assert "template.txt must contain {num_instructions}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_the_extra(
    tmp_path: Path, huggingface_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    documents = tmp_path / "documents.jsonl"
    documents.write_text('{"text": "words"}\n')
    monkeypatch.setitem(sys.modules, "aiohttp", None)  # what Python does with a package that is not there
    monkeypatch.delitem(sys.modules, "megatron_longpo.generation.http_engine", raising=False)
    flags = ["--documents", str(documents), "--output", str(tmp_path / "out"), *OPENAI[:-1], str(huggingface_folder)]
    monkeypatch.setattr("megatron_longpo.generation.runner.make_planner", lambda settings: None)
    assert main([*flags, "--no-progress"]) == 1
    assert "pip install 'megatron_longpo[generate]'" in capsys.readouterr().err


def test_help_shows_defaults(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert "--concurrency N" in text and "(default: 64)" in text
    assert "OPENAI_API_KEY" in text
    assert r"(default: {document}\n\n{instruction})" in text.replace("\n" + 24 * " ", " ")


def test_a_log_that_cannot_be_written_is_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log_to(Path("/dev/full"))
    logger.info("lost")
    log_to(tmp_path / "log")
    logger.info("kept")
    logger.remove()
    assert capfd.readouterr().err == ""
    assert (tmp_path / "log").read_text().endswith(" INFO kept\n")
