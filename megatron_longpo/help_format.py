"""How argparse's help screens look: as wide as the terminal, with the defaults; and types of its values."""

from __future__ import annotations

import argparse
import math
import re
import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_longpo.config.field import Window


class HelpFormatter(argparse.HelpFormatter):
    """Wraps the paragraphs of a description, but those with indented lines, which are commands; shows defaults."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = re.split(r"\n\s*\n", text.strip("\n"))
        kept = [[p] if re.search(r"^ ", p, re.MULTILINE) else self._split_lines(p, width) for p in paragraphs]
        return "\n\n".join("\n".join(lines) for lines in kept)

    def _split_lines(self, text: str, width: int) -> list[str]:
        # Flags and values of flags have hyphens, at which nothing breaks.
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown = isinstance(action.default, (int, float, str)) and not isinstance(action.default, bool)
        if action.help and shown and action.default != argparse.SUPPRESS and "default" not in action.help:
            return f"{action.help} (default: %(default)s)"
        return action.help


def at_least_1(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def number_at_least_0(text: str) -> float:
    """A finite number that is not below 0."""
    number = _number(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a finite number of at least 0")
    return number


def number_above_0(text: str) -> float:
    """A finite number greater than 0."""
    number = _number(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a finite number greater than 0")
    return number


def _number(text: str) -> float:
    """The number; nan, which no range has, where the text is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def window_size(text: str) -> Window:
    """The trainer's ``--window-size``, as an argparse type."""
    from megatron_longpo.config.flags import FLAGS  # a help screen needs none of them

    try:
        window: Window = FLAGS["window_size"].convert(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return window
