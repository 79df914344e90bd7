"""tools/inspect_pairs.py as a command: what it prints, writes, refuses, and how it stops."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_longpo.pairs import PreferenceDocument, Turn, write_pairs
from tools.inspect_pairs import main

SCRIPT = Path(__file__).parents[2] / "tools" / "inspect_pairs.py"


def command(*flags: object) -> list[str]:
    return [sys.executable, str(SCRIPT), *map(str, flags)]


def run(*flags: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*flags), capture_output=True, text=True)


def test_pairs_report_and_page(generated: Path, tmp_path: Path) -> None:
    page = tmp_path / "new" / "report.html"
    done = run(generated, "--num-pairs", 2, "--html", page)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("similarity") >= 2 and "━━ Report" in done.stdout and "\033" not in done.stdout
    assert done.stderr == "" and page.read_text().startswith("<!doctype html>")
    assert [path.name for path in page.parent.iterdir()] == ["report.html"]
    one = run(generated, "--id", "document 1")
    assert one.returncode == 0 and one.stdout.count("━━ document 1 ·") == 2 and "━━ Report" not in one.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nowhere.jsonl"], "error: nowhere.jsonl: there is no such file"),
        ([__file__], f"error: {__file__}:1: is not JSON"),
        (["{pairs}", "--num-pairs", "-1"], "error: --num-pairs -1 must be at least 0"),
        (["{pairs}", "--max-chars", "0"], "error: --max-chars 0 must be at least 1"),
        (["{pairs}", "--id", "document 99"], "error: --id document 99: none of 12 documents has this id; did you mean"),
        (["{pairs}", "--id", "document 1", "--num-pairs", "5"], "error: --num-pairs 5 has no effect with --id, which"),
        (["{pairs}", "--id", "document 1", "--seed", "0"], "error: --seed 0 has no effect with --id, which"),
        (["{pairs}", "--html", "{folder}"], "is a folder: give a file's name"),
        (["{pairs}", "--html", "{pairs}/page.html"], "cannot be written"),
        (["{pairs}", "--html", "{pairs}"], "is one of the pairs files"),
        (["{pairs}", "--chat-template", "x"], "no effect without --tokenizer-model"),
        (["{pairs}", "--tokenizer-model", "nowhere"], "error: --tokenizer-model nowhere"),
    ],
)
def test_mistakes_get_one_line(
    generated: Path,
    flags: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"pairs": generated / "pairs.jsonl", "folder": generated}
    before = sorted(generated.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["inspect_pairs.py", *(flag.format(**places) for flag in flags)])
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)  # the test process keeps its own
    with pytest.raises(SystemExit) as failed:
        main()
    printed = capsys.readouterr()
    # argparse prints for itself; what sys.exit is given, the interpreter would print.
    errors = printed.err if failed.value.code == 2 else str(failed.value.code)
    assert message in errors and printed.out == ""
    assert errors.count("inspect_pairs.py: error") == 1 and "Traceback" not in errors
    assert sorted(generated.rglob("*")) == before


def test_a_reader_that_has_seen_enough(generated: Path) -> None:
    process = subprocess.Popen(
        command(generated, "--num-pairs", 30, "--max-chars", 10_000),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout and process.stderr
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    pairs, page = tmp_path / "pairs.jsonl", tmp_path / "new" / "page.html"
    turn = Turn("ask", "yes " * 2000, "no " * 2000, "chunk", None)
    write_pairs(pairs, (PreferenceDocument(f"d{i}", "x", (turn,)) for i in range(3_000)))
    flags = [pairs, "--html", page]
    process = subprocess.Popen(command(*flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not page.parent.exists():  # made right before the reading starts
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and errors == "inspect_pairs.py: stopped\n" and printed == ""
    assert list(page.parent.iterdir()) == []
