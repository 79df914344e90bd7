"""Pairs and report in the terminal."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_longpo.inspection.inspect import InspectOptions, inspect
from megatron_longpo.inspection.pair_text import pair_lines
from megatron_longpo.inspection.plain_text import num_cells, printable, shortened, wrap
from megatron_longpo.inspection.report_text import duration, report_lines
from megatron_longpo.inspection.terminal import Terminal, bar, place
from megatron_longpo.pairs import PreferenceDocument, Turn, write_pairs


@given(st.text(max_size=80), st.integers(2, 30))
def test_wrapped_lines_fit_and_lose_nothing_but_blanks(text: str, width: int) -> None:
    text = printable(text)
    lines = wrap(text, width)
    assert all(num_cells(line) <= width for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())


def test_wrapping_keeps_indents_and_counts_cells() -> None:
    assert wrap("    code here\n\nand text", 9) == ["    code", "here", "", "and text"]
    assert wrap("長い文書です", 4) == ["長い", "文書", "です"]
    # An indent that leaves no room is left out.
    assert wrap("    0", 4) == wrap("      0", 4) == ["0"] and wrap("   長", 4) == ["長"]
    assert wrap("one two", 3) == ["one", "two"]
    assert wrap("abcdefgh", 3) == ["abc", "def", "gh"]
    assert num_cells("e\u0301長") == 3


def test_a_document_cannot_command_the_terminal() -> None:
    assert printable("\x1b[2Jx\x00\r\n\ty\x9b\u202e") == "\u241b[2Jx\u2400\n    y\ufffd\ufffd"


def test_long_texts_lose_their_middle() -> None:
    assert shortened("abcdefghij", 6) == ("abcd", 4, "ij")
    assert shortened("abc", 3) == ("abc", 0, "")
    head, left_out, tail = shortened("x" * 1000, 1)
    assert (len(head), left_out, len(tail)) == (1, 999, 0)


def test_bars_and_places() -> None:
    assert (bar(0, 8), bar(0.001, 8), bar(0.5, 8), bar(1, 8)) == ("", "▏", "████", "████████")
    assert place(0, 0.001, 10) == "█·········" and place(0.999, 1, 10) == "·········█" and place(0, 1, 4) == "████"
    assert place(0.5, 0.75, 8) == "····██··"


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colours_are_for_terminals_that_want_them() -> None:
    assert Terminal.of(Tty(), {}).has_colour
    assert not Terminal.of(Tty(), {"NO_COLOR": "1"}).has_colour
    assert not Terminal.of(Tty(), {"TERM": "dumb"}).has_colour
    assert not Terminal.of(io.StringIO(), {}).has_colour
    assert "\033" not in Terminal(80, False).paint("x", "bold") and "\033" in Terminal(80, True).paint("x", "bold")


@pytest.mark.parametrize("width", [40, 80, 120])
def test_pairs_stand_side_by_side_where_there_is_room(tmp_path: Path, width: int) -> None:
    document = "The long document, part one.\n\nPart two \x1b[31m."
    turn = Turn("What is\nthis?", "Chosen " * 30, "拒否 " * 30, document[4:17], (4, 17))
    write_pairs(tmp_path / "pairs.jsonl", [PreferenceDocument("one", document, (turn,))])
    inspection = inspect(InspectOptions((str(tmp_path),)), progress=False)
    (view,) = inspection.views
    lines = list(pair_lines(view, Terminal(width), 10_000))
    assert all(num_cells(line) <= width for line in lines), [line for line in lines if num_cells(line) > width]
    assert "\x1b" not in "".join(lines)
    both = [line for line in lines if "Chosen" in line and "拒否" in line]
    assert bool(both) == (width >= 80)
    assert len({num_cells(line.split("│")[0]) for line in both}) <= 1, "the columns are straight"
    assert any("long document" in line for line in lines) and "similarity 0.00" in lines[-1]
    shown = "\n".join(pair_lines(view, Terminal(width), 20))
    assert "[… 190 characters …]" in shown


@pytest.mark.parametrize("width", [40, 80])
def test_rows_without_a_chunk_show_their_whole_prompts(tmp_path: Path, width: int) -> None:
    (tmp_path / "trl.jsonl").write_text(
        '{"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Long text. Why?"}],'
        ' "chosen": [{"role": "assistant", "content": "So."}], "rejected": [{"role": "assistant", "content": "No."}]}'
    )
    inspection = inspect(InspectOptions((str(tmp_path),)), progress=False)
    (view,) = inspection.views
    lines = list(pair_lines(view, Terminal(width), 10_000))
    assert lines[1:7] == [
        "long prompt  15 characters",
        "system       9 characters",
        "  Be brief.",
        "short prompt none: the row has no short prompt",
        "prompt's end 15 characters · 3 words",
        "  Long text. Why?",
    ]
    report = "\n".join(report_lines(inspection, Terminal(width)))
    assert "with the chunk's place known  0" in report and "place of chunks" not in report


def test_tokens_without_a_tokenizer_are_counted_only(tokenized: Path) -> None:
    (view, *_) = inspect(InspectOptions((str(tokenized),)), progress=False).views
    lines = list(pair_lines(view, Terminal(80), 10_000))
    assert lines[1] == "Only tokens are known; --tokenizer-model DIR shows them as text."
    assert all(num_cells(line) <= 80 for line in lines) and "  " not in {line[:2] for line in lines}


def test_long_counts_are_short_where_columns_are_narrow(tmp_path: Path) -> None:
    turn = Turn("What?", "Chosen " * 1_500, "Rejected " * 1_500, "A part.")
    write_pairs(tmp_path / "pairs.jsonl", [PreferenceDocument("one", "A document.", (turn,))])
    (view,) = inspect(InspectOptions((str(tmp_path),)), progress=False).views
    lines = list(pair_lines(view, Terminal(72), 100))
    assert "chosen  10,500 c · 1,500 w         │ rejected  13,500 c · 1,500 w" in lines


def test_the_report_names_every_number(generated: Path) -> None:
    inspection = inspect(InspectOptions((str(generated),)), progress=False)
    lines = list(report_lines(inspection, Terminal(80)))
    assert max(map(num_cells, lines)) <= 80
    report = "\n".join(lines)
    for line in (
        "documents                     12  (12 schema 1)",
        "pairs                         30",
        "documents dropped, by reason",
        "no pairs left",
        "identical answers",
        "4 min",
    ):
        assert line in report
    assert "\033" not in report
    assert "\033" in "\n".join(report_lines(inspection, Terminal(100, has_colour=True)))


def test_times_are_said_as_people_do() -> None:
    assert [duration(s) for s in (0.4, 75, 725, 12_000)] == ["0 s", "75 s", "12 min", "3 h 20 min"]
