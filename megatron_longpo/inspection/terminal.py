"""A terminal's width and colours, and bars made of characters."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TextIO

_CODES = {"bold": "1", "dim": "2", "chosen": "1;36", "rejected": "1;33", "accent": "35"}
_EIGHTHS = " ▏▎▍▌▋▊▉█"

MIN_WIDTH, MAX_WIDTH = 40, 160


@dataclass(frozen=True)
class Terminal:
    """What to write for.

    Args:
        width: Columns.
        has_colour: Whether to colour.
    """

    width: int = 100
    has_colour: bool = False

    @classmethod
    def of(cls, stream: TextIO, environment: Mapping[str, str] = os.environ) -> Terminal:
        """The terminal behind a stream; no colours for a pipe, nor where NO_COLOR (no-color.org) is set."""
        is_terminal = stream.isatty()
        width = shutil.get_terminal_size((100, 24)).columns
        dumb = environment.get("TERM") == "dumb"
        colour = is_terminal and not environment.get("NO_COLOR") and not dumb
        return cls(min(max(width, MIN_WIDTH), MAX_WIDTH), colour)

    def paint(self, text: str, style: str) -> str:
        """A text in one of the styles."""
        return f"\033[{_CODES[style]}m{text}\033[0m" if self.has_colour and text else text


def bar(share: float, width: int) -> str:
    """A bar of a length from 0 to 1, in eighths of a column; what is there is seen."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    if share > 0:
        eighths = max(1, eighths)
    full, rest = divmod(eighths, 8)
    return "█" * full + (_EIGHTHS[rest] if rest else "")


def place(start: float, end: float, width: int) -> str:
    """A document as a line, with a piece of it from ``start`` to ``end`` (0 to 1) filled."""
    first = min(int(start * width), width - 1)
    last = max(first + 1, min(width, round(end * width)))
    return "·" * first + "█" * (last - first) + "·" * (width - last)
