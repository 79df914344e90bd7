"""The long documents: JSON, tables, `datasets` folders and text files, read one at a time in a fixed order."""

from __future__ import annotations

import glob
import gzip
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_longpo.data.chat_tokenizer import ChatTokenizer
from megatron_longpo.generation.chunking import draw_chunks
from megatron_longpo.generation.model_files import run_tokenizer
from megatron_longpo.generation.rollout import DocumentPlan
from megatron_longpo.generation.settings import GenerationSettings
from megatron_longpo.pair_formats.counting import count_rows
from megatron_longpo.pair_formats.fields import kind_of
from megatron_longpo.pair_formats.raw import GZIP_ERRORS, JSON_SUFFIXES, ROW_SUFFIXES, raw_rows

_TEXT_SUFFIXES = (".txt", ".md", ".rst", ".tex", ".py", ".c", ".h", ".cc", ".cpp", ".java", ".js", ".ts", ".go", ".rs")
"""What is taken from a folder beside `ROW_SUFFIXES`. A file named itself may end in anything; each is a document
of plain text, but those of `JSON_SUFFIXES`."""


@dataclass(frozen=True)
class CorpusDocument:
    """One document: its place in the corpus, its id, its text."""

    index: int
    id: str
    text: str


def corpus_files(patterns: tuple[str, ...]) -> list[Path]:
    """The files behind ``--documents``, each once: patterns expanded, folders replaced by what is in them, sorted.

    Raises:
        ValueError: A pattern matches nothing, or a folder holds no document.
    """
    files: dict[Path, None] = {}
    for pattern in patterns:
        # A name that exists is meant as it stands, brackets and all.
        matches = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise ValueError(f"--documents {pattern}: there is no such file or folder, and no file matches it")
        for match in map(Path, matches):
            if not match.is_dir():
                files[match] = None
                continue
            inside = [path for path in sorted(match.rglob("*")) if path.is_file() and _is_document(path)]
            if not inside:
                raise ValueError(
                    f"--documents {match}: the folder holds no document; it may hold {', '.join(ROW_SUFFIXES)} and "
                    f"{', '.join(_TEXT_SUFFIXES)} files; give .json files by a pattern"
                )
            files |= dict.fromkeys(inside)
    return list(files)


def _is_document(path: Path) -> bool:
    # Hugging Face leaves the results of map() beside the data.
    return path.name.endswith((*ROW_SUFFIXES, *_TEXT_SUFFIXES)) and not path.name.startswith("cache-")


def count_documents(settings: GenerationSettings) -> int | None:
    """How many documents there are, if that can be told without reading them all."""
    files = corpus_files(settings.documents)
    with_rows = [path for path in files if path.name.endswith((*ROW_SUFFIXES, *JSON_SUFFIXES))]
    rows = count_rows(with_rows)
    if rows is None:
        return settings.max_documents
    total = rows + len(files) - len(with_rows)
    return min(total, settings.max_documents or total)


def read_corpus(settings: GenerationSettings) -> Iterator[CorpusDocument]:
    """The documents in order; memory holds one.

    Raises:
        ValueError: A file, row or field is unusable; the message names it.
    """
    seen: set[int] = set()
    index = 0
    files = corpus_files(settings.documents)
    names = Counter(path.name for path in files)
    for path in files:
        for where, id, text in _documents(path, path.name if names[path.name] == 1 else str(path), settings):
            if settings.max_documents is not None and index >= settings.max_documents:
                return
            if not _is_unicode(id):
                raise ValueError(f"{where}: the id {id!r} is no valid Unicode: give another id, or rename the file")
            key = hash(id)
            if key in seen:
                raise ValueError(
                    f"{where}: the id {id!r} occurs a second time; give every document its own, or name the field that "
                    "tells documents apart with --id-field"
                )
            seen.add(key)
            yield CorpusDocument(index, id, text)
            index += 1
    if index == 0:
        raise ValueError(f"--documents {' '.join(settings.documents)}: there is not a single document in it")


def _documents(path: Path, name: str, settings: GenerationSettings) -> Iterator[tuple[str, str, str]]:
    """``(place, id, text)`` of one file's documents; rows without an id are called by ``name`` and line."""
    if not path.name.endswith((*ROW_SUFFIXES, *JSON_SUFFIXES)):
        yield str(path), str(path), _read_text(path)
        return
    for where, row in raw_rows(path):
        if settings.text_field not in row:
            fields = ", ".join(map(repr, row)) or "none"
            raise ValueError(
                f"{where}: there is no field {settings.text_field!r}, the fields are: {fields}; name the one that "
                "holds the text with --text-field"
            )
        text = row[settings.text_field]
        if not isinstance(text, str):
            raise ValueError(
                f"{where}: field {settings.text_field!r} is {kind_of(text)}, not a string: leave the row out"
            )
        id = row.get(settings.id_field)
        if isinstance(id, (list, dict, np.ndarray)):
            raise ValueError(
                f"{where}: field {settings.id_field!r} is {kind_of(id)}, not an id; name another one with --id-field"
            )
        has_id = id is not None and str(id).strip()
        yield str(where), str(id) if has_id else f"{name}:{where.line}", text


def _read_text(path: Path) -> str:
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except GZIP_ERRORS as error:
            raise ValueError(f"{path}: is not a whole gzip file ({error}); copy or pack it again") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 at byte {error.start}; save the file as UTF-8") from error


def make_planner(settings: GenerationSettings) -> Callable[[CorpusDocument], DocumentPlan]:
    """What a worker does with a document: `plan_document`."""
    tokenizer = run_tokenizer(settings)
    return lambda document: plan_document(document, tokenizer, settings)


def plan_document(document: CorpusDocument, tokenizer: ChatTokenizer, settings: GenerationSettings) -> DocumentPlan:
    """Measure a document, and draw its chunks where it is of the right length."""

    def dropped(reason: str, num_tokens: int = 0) -> DocumentPlan:
        return DocumentPlan(document.index, document.id, document.text, num_tokens, dropped=reason)

    text = document.text
    if not text.strip() or not _is_unicode(text):
        return dropped("no_text")
    # No token is shorter than a byte, so that most short documents need not be encoded to be known as such.
    if len(text.encode()) < settings.min_document_tokens:
        return dropped("document_too_short")
    _, starts, _ = tokenizer.encode(text)
    if len(starts) < settings.min_document_tokens:
        return dropped("document_too_short", len(starts))
    if len(starts) > settings.target_length:
        return dropped("document_too_long", len(starts))
    chunks = draw_chunks(
        text,
        np.maximum.accumulate(starts),
        document.id,
        min_tokens=settings.min_chunk_tokens,
        max_tokens=settings.max_chunk_tokens,
        max_chunks=settings.max_chunks_per_document,
        seed=settings.seed,
    )
    if not chunks:
        return dropped("no_chunk", len(starts))
    return DocumentPlan(document.index, document.id, text, len(starts), tuple(chunks))


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
