"""Text rows to schema 1: the same tokens, all or nothing, and the command that does it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_longpo.data.chat_tokenizer import ChatTokenizer
from megatron_longpo.data.tokenize import DocumentTokenizer
from megatron_longpo.import_pairs.convert import ImportOptions, import_pairs
from megatron_longpo.pairs import Message, PreferenceDocument, Turn, read_pairs, write_pairs
from tests.import_pairs.conftest import Importer, write_rows
from tests.tokenized_rows import text_document
from tools import import_pairs as import_command

SCRIPT = Path(__file__).parents[2] / "tools" / "import_pairs.py"


def test_trl_rows_keep_their_tokens(
    huggingface_tokenizer: ChatTokenizer,
    run: Importer,
) -> None:
    system = {"role": "system", "content": "Be brief."}
    long, short = "One.\n\nTwo <b>.\n\nThree.", "Two <b>."
    rows: list[dict[str, Any]] = [
        {"prompt": f"{long}\n\nWhy?", "short_prompt": f"{short}\n\nWhy?", "chosen": "So.", "rejected": "No."},
        {"prompt": f"{long}\n\nWhy?", "short_prompt": "Something else. Why?", "chosen": "So.", "rejected": "No."},
        {
            "prompt": [system, {"role": "user", "content": long}],
            "chosen": [{"role": "assistant", "content": "So."}],
            "rejected": [{"role": "assistant", "content": "No."}],
        },
    ]
    imported, counts = run(rows)
    first, second, third = imported
    assert (first.document, first.turns[0].instruction, first.turns[0].chunk_span) == (long, "Why?", (6, 14))
    assert (second.document, second.turns[0].instruction) == (f"{long}\n\nWhy?", "")
    assert third.long_context == (Message("system", "Be brief."),) and third.turns[0].chunk is None
    assert counts.prompts == {"split": 1, "whole": 2}
    tokenize = DocumentTokenizer(huggingface_tokenizer)
    for row, ours in zip(rows, imported, strict=True):
        assert ours.provenance["imported_from"]["format"] == "trl"
        (theirs,) = read_back(row)
        assert tokenize(replace(ours, id="")) == tokenize(replace(theirs, id=""))


def read_back(row: dict[str, Any]) -> list[Any]:
    from megatron_longpo.pair_formats import trl
    from megatron_longpo.pairs import Location

    return [trl.parse(row, Location("x", 1))]


def test_schema_1_passes_unchanged(tmp_path: Path, text: str) -> None:
    source = tmp_path / "pairs.jsonl"
    whole = PreferenceDocument("whole", "A.\n\nWhy?", (Turn("", "a", "b", "A.\n\nWhy?"),), {"x": [1]})
    write_pairs(source, [text_document(text, 0, 2), whole])
    output = tmp_path / "out.jsonl"
    counts = import_pairs(ImportOptions((str(source),), str(output)), progress=False)
    assert output.read_bytes() == source.read_bytes()
    assert counts.read == {"schema 1": 2} and not counts.prompts


def test_the_command(tmp_path: Path) -> None:
    row = {"prompt": "Long.\n\nWhy?", "short_prompt": "Long.\n\nWhy?", "chosen": "So.", "rejected": "No."}
    source, output = write_rows(tmp_path / "rows.jsonl", [row]), tmp_path / "pairs.jsonl"
    command = [sys.executable, str(SCRIPT), "--input", source, "--output"]
    done = subprocess.run([*command, str(output)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.split()[-1] for line in done.stdout.splitlines() if line.startswith("documents written")] == ["1"]
    assert len(list(read_pairs(output))) == 1
    failed = subprocess.run([*command, source], capture_output=True, text=True)
    assert failed.returncode == 1 and "is one of the files of --input" in failed.stderr
    assert len(failed.stderr.strip().splitlines()) == 1


def test_the_tokenizer_s_flags_need_a_tokenizer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["--chat-template", "x"], ["--tokenizer-type", "HuggingFaceTokenizer"], ["--trust-remote-code"]):
        monkeypatch.setattr("sys.argv", ["import_pairs.py", "--input", "x.jsonl", "--output", "y.jsonl", *words])
        with pytest.raises(SystemExit, match="2"):
            import_command.main()
        assert f"{words[0]} has no effect without --tokenizer-model: give that too" in capsys.readouterr().err


def test_a_bad_row_leaves_nothing(tmp_path: Path, run: Importer) -> None:
    good = {"prompt": "Long. Why?", "chosen": "So.", "rejected": "No."}
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: field 'rejected' is identical"):
        run([good, good | {"rejected": "So."}])
    assert not list((tmp_path / "out").iterdir())
    rows = str(tmp_path / "rows.jsonl")
    for output, message in (("out", r"--output .* is a folder"), ("rows.jsonl/x", r"--output .* cannot be written")):
        with pytest.raises(ValueError, match=message):
            import_pairs(ImportOptions((rows,), str(tmp_path / output)), progress=False)
