"""Text that is safe and straight on a terminal: control characters shown, lines broken by the width of characters."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

_BIDIRECTIONAL = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_VISIBLE = {
    **{code: chr(0x2400 + code) for code in range(0x20) if code not in (0x09, 0x0A)},
    0x09: "    ",
    0x7F: "\u2421",
    **dict.fromkeys(range(128, 160), "�"),
    **{ord(character): "\ufffd" for character in _BIDIRECTIONAL},
    0x2028: "\n",
    0x2029: "\n",
}


def printable(text: str) -> str:
    """A text in which control characters are seen and do nothing: a document may hold a terminal's commands."""
    return text.replace("\r\n", "\n").translate(_VISIBLE)


@lru_cache(maxsize=4096)
def _cells_of(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def num_cells(text: str) -> int:
    """How many columns of a terminal a printable line takes."""
    return len(text) if text.isascii() else sum(map(_cells_of, text))


def padded(text: str, width: int) -> str:
    """A line with blanks behind it up to a width."""
    return text + " " * max(0, width - num_cells(text))


def wrap(text: str, width: int) -> list[str]:
    """The lines of a printable text, none wider than ``width`` cells; breaks at blanks where there are any."""
    return [piece for line in text.split("\n") for piece in _wrap_line(line.rstrip(), width)]


def _wrap_line(line: str, width: int) -> list[str]:
    lines, current, used = [], "", 0
    for piece in re.findall(r" +|[^ ]+", line):
        cells = num_cells(piece)
        if used + cells > width and piece.isspace():
            if current:
                lines.append(current)
            current, used = "", 0
            continue
        if used + cells > width and current.strip():
            lines.append(current.rstrip())
            current, used = "", 0
        elif used + cells > width and used + 2 > width:
            current, used = "", 0  # an indent that leaves no room for a wide character
        while used + cells > width:
            head = _head(piece, max(1, width - used))
            lines.append(current + head)
            current, used, piece = "", 0, piece[len(head) :]
            cells = num_cells(piece)
        current, used = current + piece, used + cells
    return [*lines, current]


def _head(piece: str, width: int) -> str:
    """As many characters as fit into a width, one at least."""
    used = 0
    for at, character in enumerate(piece):
        used += _cells_of(character)
        if used > width and at:
            return piece[:at]
    return piece


def shortened(text: str, max_chars: int) -> tuple[str, int, str]:
    """A text's beginning and end, with the number of characters left out between; all of it if it is short enough."""
    if len(text) <= max_chars:
        return text, 0, ""
    head = max(1, max_chars * 2 // 3)
    tail = max_chars - head
    return text[:head], len(text) - head - tail, text[len(text) - tail :]
