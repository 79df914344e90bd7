"""Checked access to the fields of one row: every error names the place, the field and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from megatron_longpo.pair_formats.document import Location, PairsError, Turn


def text(row: Mapping[str, Any], key: str, where: Location, path: str = "") -> str:
    """A string that is present and not blank."""
    name = f"{path}{key}"
    if key not in row:
        raise PairsError(where, name, "is missing", "add it")
    return checked_text(row[key], name, where)


def checked_text(value: Any, name: str, where: Location) -> str:
    """A value that must be a string, not blank, and valid Unicode."""
    if not isinstance(value, str):
        raise PairsError(where, name, f"is {kind_of(value)}, not a string", "write it as a string")
    if not value.strip():
        raise PairsError(where, name, "is empty", "fill it in or leave the pair out")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        problem = f"has half of a surrogate pair at character {error.start}, which no tokenizer can read"
        raise PairsError(where, name, problem, "remove or repair that character") from error
    return value


def check_answers(turn: Turn, where: Location, path: str = "") -> Turn:
    """A turn whose answers differ in more than blanks around them."""
    if turn.chosen.strip() == turn.rejected.strip():
        raise PairsError(
            where, f"{path}rejected", f"is identical to '{path}chosen'", "a pair must differ; leave this one out"
        )
    return turn


def check_known(row: Mapping[str, Any], known: Iterable[str], where: Location, path: str = "") -> None:
    """A row without fields that nothing would read."""
    for key in row:
        if key not in known:
            close = difflib.get_close_matches(str(key), list(known), n=1)
            hint = f"did you mean '{path}{close[0]}'? " if close else ""
            raise PairsError(where, f"{path}{key}", "is unknown", f"{hint}put anything of your own in 'provenance'")


def kind_of(value: Any) -> str:
    """A JSON value's type in words."""
    if value is None:
        return "null"
    kinds = {
        bool: "true/false",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        np.ndarray: "a list",  # of numbers, in a table
        dict: "an object",
    }
    return kinds.get(type(value), type(value).__name__)
