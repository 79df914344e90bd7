"""The raw rows of files, before any is understood: JSON lines, JSON lists, or the tables of Hugging Face datasets."""

from __future__ import annotations

import gzip
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_longpo.pair_formats.document import Location, PairsError
from megatron_longpo.pair_formats.fields import kind_of

TABLE_SUFFIXES = (".parquet", ".arrow")
ROW_SUFFIXES = (".jsonl", ".jsonl.gz", *TABLE_SUFFIXES)
"""Files with one document a line or row."""

JSON_SUFFIXES = (".json", ".json.gz")
"""Files with a list of documents, or one a line. Not looked for in folders: there .json files describe others."""

GZIP_ERRORS = (gzip.BadGzipFile, EOFError, zlib.error)
"""What reading a damaged or cut .gz file raises."""

GENERATED_PAIRS, GENERATION_REPORT, GENERATION_STATE = "pairs.jsonl", "report.json", "state"
"""What an output folder of generation holds."""

_BATCH_ROWS = 16


def input_files(paths: Sequence[str | Path]) -> list[Path]:
    """The files behind paths: files as they are, folders replaced by the tables and JSON lines in them, sorted.

    Of an output folder of generation, which holds other JSON lines too, it is `GENERATED_PAIRS` alone; so too where
    such a folder lies in another.

    Raises:
        ValueError: A path does not exist, is empty, or is a folder without such files.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if _is_generation(path):
            files.append(path / GENERATED_PAIRS)
        elif path.is_dir():
            found = [p for p in sorted(path.rglob("*")) if p.name.endswith(ROW_SUFFIXES)]
            # Hugging Face leaves the results of map() beside the data.
            found = [p for p in found if not p.name.startswith("cache-")]
            found = [p for p in found if p.name == GENERATED_PAIRS or not _is_generation(p.parent)]
            if not found and (path / GENERATION_STATE).is_dir():
                raise ValueError(
                    f"--input {path}: a generation that has not come to its end: run tools/generate_pairs.py again, it "
                    "goes on where it stopped"
                )
            if not found:
                raise ValueError(f"--input {path}: the folder has no .jsonl, .jsonl.gz, .parquet or .arrow file")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"--input {path}: there is no such file")
    for file in files:
        if file.stat().st_size == 0:
            raise ValueError(f"--input {file}: the file is empty; give at least one pair")
    return files


def _is_generation(folder: Path) -> bool:
    return all((folder / name).is_file() for name in (GENERATED_PAIRS, GENERATION_REPORT))


def raw_rows(file: Path) -> Iterator[tuple[Location, dict[str, Any]]]:
    """The rows of one file, one at a time.

    Raises:
        PairsError: A line or item is not a JSON object in UTF-8; a table or a packed file cannot be read.
    """
    if file.suffix == ".parquet":
        yield from _parquet_rows(file)
    elif file.suffix == ".arrow":
        yield from _arrow_rows(file)
    else:
        try:
            yield from _json_rows(file)
        except GZIP_ERRORS as error:
            raise PairsError(str(file), "", f"is not a whole gzip file ({error})", "copy or pack it again") from error


def _json_rows(file: Path) -> Iterator[tuple[Location, dict[str, Any]]]:
    fix = "write one JSON object per line"
    with gzip.open(file) if file.suffix == ".gz" else open(file, "rb") as content:
        lines = iter(content)
        first = next(lines, b"").removeprefix(b"\xef\xbb\xbf")
        if file.name.endswith(JSON_SUFFIXES):
            fix += ", or one list of objects"
            if first.lstrip().startswith(b"["):
                items = _json(first + content.read(), str(file), fix)
                yield from ((where, _object(item, where, fix)) for where, item in _placed(file, items))
                return
        for where, line in _placed(file, itertools.chain([first], lines)):
            if line.strip():
                yield where, _object(_json(line, where, fix), where, fix)


def _placed(file: Path, rows: Iterable[Any]) -> Iterator[tuple[Location, Any]]:
    return ((Location(str(file), number), row) for number, row in enumerate(rows, 1))


def _json(content: bytes, where: Location | str, fix: str) -> Any:
    try:
        return json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise PairsError(where, "", f"is not UTF-8 at byte {error.start}", "save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise PairsError(where, "", f"is not JSON ({str(error) or type(error).__name__})", fix) from error


def _object(value: Any, where: Location, fix: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise PairsError(where, "", f"is {kind_of(value)}, not an object", fix)
    return value


def _parquet_rows(file: Path) -> Iterator[tuple[Location, dict[str, Any]]]:
    arrow = _pyarrow(file)
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        batches = pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=_BATCH_ROWS)
        yield from _table_rows(file, batches)
    except arrow.ArrowException as error:
        raise PairsError(str(file), "", f"is not a readable Parquet file ({error})", "download it again") from error


def _arrow_rows(file: Path) -> Iterator[tuple[Location, dict[str, Any]]]:
    arrow = _pyarrow(file)
    import pyarrow.ipc  # type: ignore[import-untyped]

    try:
        with arrow.memory_map(str(file)) as source:
            yield from _table_rows(file, pyarrow.ipc.open_stream(source))
    except arrow.ArrowException as error:
        raise PairsError(
            str(file), "", f"is not a readable Arrow stream ({error})", "save the dataset again"
        ) from error


def _table_rows(file: Path, batches: Any) -> Iterator[tuple[Location, dict[str, Any]]]:
    number = 0
    for batch in batches:
        for row in range(batch.num_rows):
            number += 1
            values = {name: _python(batch.column(name)[row]) for name in batch.schema.names}
            yield Location(str(file), number), values


def _python(scalar: Any) -> Any:
    """An Arrow value as Python's, but lists of numbers as arrays: a document has half a million of them."""
    import pyarrow.types as types  # type: ignore[import-untyped]

    values = getattr(scalar, "values", None)
    if values is None or not (types.is_list(scalar.type) or types.is_large_list(scalar.type)):
        return scalar.as_py()
    if types.is_integer(values.type) and values.null_count == 0:
        return values.to_numpy(zero_copy_only=False)
    if types.is_list(values.type) or types.is_large_list(values.type):
        return [_python(value) for value in values]
    return scalar.as_py()


def _pyarrow(file: Path) -> Any:
    try:
        import pyarrow  # type: ignore[import-untyped]
    except ImportError as error:
        raise ValueError(f"--input {file}: reading {file.suffix} files needs pyarrow: pip install pyarrow") from error
    return pyarrow
