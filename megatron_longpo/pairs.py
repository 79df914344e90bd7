"""Pairs files: the documents, instructions and answers that training starts from.

    for row in read_pairs(["pairs.jsonl"]):
        ...

Three formats are read and told apart row by row: the project's own (`pair_formats.schema`), TRL's preference rows
(`pair_formats.trl`), and the tokenized sets that the authors of LongPO released (`pair_formats.tokenized`).
`docs/data.md` describes them with examples.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_longpo.files import atomic_writer
from megatron_longpo.pair_formats import schema, tokenized, trl
from megatron_longpo.pair_formats.document import (
    Location,
    Message,
    PairsError,
    PairsRow,
    PreferenceDocument,
    TokenizedPair,
    TokenSequence,
    Turn,
)
from megatron_longpo.pair_formats.raw import input_files, raw_rows

__all__ = [
    "SCHEMA_1",
    "TOKENIZED",
    "TRL",
    "Location",
    "Message",
    "PairsError",
    "PairsRow",
    "PreferenceDocument",
    "TokenSequence",
    "TokenizedPair",
    "Turn",
    "read_formats",
    "read_pairs",
    "write_pairs",
]

SCHEMA_1, TRL, TOKENIZED = "schema 1", "TRL", "tokenized"

FORMATS: dict[str, Callable[[Mapping[str, Any], Location], PairsRow]] = {
    SCHEMA_1: schema.parse,
    TRL: trl.parse,
    TOKENIZED: tokenized.parse,
}
"""What reads a row of each format."""


def read_pairs(paths: str | Path | Sequence[str | Path]) -> Iterator[PairsRow]:
    """Read files one row at a time, in order; memory holds one row.

    Args:
        paths: Files (.jsonl, .parquet, .arrow) or folders of them.

    Raises:
        ValueError: A file is missing or empty, or there is no row at all.
        PairsError: A row cannot be used; the message names file, line, field and the fix.
    """
    return (pair for _, pair in read_formats(paths))


def read_formats(paths: str | Path | Sequence[str | Path]) -> Iterator[tuple[str, PairsRow]]:
    """`read_pairs`, with the name of each row's format before it: a key of `FORMATS`."""
    seen: dict[str, Location] = {}
    paths = [paths] if isinstance(paths, str | Path) else paths
    for file in input_files(paths):
        for where, row in raw_rows(file):
            name = format_of(row, where)
            pair = FORMATS[name](row, where)
            if pair.id in seen:
                problem = f"is {pair.id!r}, which {seen[pair.id]} already has"
                fix = "give every document its own id; rows without one are called by their file's name and line"
                raise PairsError(where, "id", problem, fix)
            seen[pair.id] = where
            yield name, pair
    if not seen:
        raise ValueError(f"--input {' '.join(map(str, paths))}: there is not a single pair in it; give at least one")


def format_of(row: Mapping[str, Any], where: Location) -> str:
    """The name of a row's format, by its fields.

    Raises:
        PairsError: It is of no known format.
    """
    if "schema" in row:
        return SCHEMA_1
    if "chosen_input_ids" in row or "rejected_input_ids" in row:
        return TOKENIZED
    if "chosen" in row and "rejected" in row:
        return TRL
    if "document" in row or "turns" in row:
        raise PairsError(where, "schema", "is missing", f'add "schema": {schema.SCHEMA}')
    fields = ", ".join(map(repr, row)) or "none"
    raise PairsError(
        where,
        "",
        f"is no preference pair, its fields are: {fields}",
        "give 'schema', 'id', 'document', 'turns', or TRL's 'prompt', 'chosen', 'rejected'",
    )


def write_pairs(path: str | Path, documents: Iterable[PreferenceDocument]) -> int:
    """Write documents as JSON lines of schema 1; the file appears only when all are written.

    Returns:
        The number of documents.

    Raises:
        PairsError: A document could not be read back.
    """
    count = 0
    with atomic_writer(path) as file:
        for count, document in enumerate(documents, 1):
            row = schema.dump(document)
            schema.parse(row, Location(str(path), count))
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return count
