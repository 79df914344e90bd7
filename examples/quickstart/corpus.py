"""Documents that every Python carries: the language reference (`pydoc_data.topics`) and standard-library sources.

Both are cut at paragraph or top-level boundaries into documents of a few thousand characters. Some are held back from
pre-training: they become the long documents of the preference pairs.
"""

from __future__ import annotations

import json
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics

from tqdm import tqdm

from megatron_longpo.files import atomic_writer
from megatron_longpo.generation.draw import draw

MODULES = """
abc bisect calendar cmd code codeop collections/__init__ configparser contextlib copy csv difflib fileinput fnmatch
fractions functools getopt glob hashlib heapq hmac json/decoder json/encoder linecache logging/__init__ mimetypes
numbers operator pprint queue random sched shelve shlex socketserver statistics string tempfile textwrap traceback
weakref
"""
"""Well-documented modules, named as files below the standard library; one that this Python lacks is passed over."""


KINDS = ("reference", "source")


@dataclass(frozen=True)
class CorpusSettings:
    """What the corpus depends on, apart from the Python that runs it."""

    min_document_chars: int = 2200
    max_document_chars: int = 4400
    num_held_documents: int = 72
    seed: int = 0


@dataclass(frozen=True)
class Document:
    """One text with where it came from; `held` keeps it out of pre-training."""

    id: str
    kind: str  # one of KINDS
    text: str
    held: bool


def write_corpus(path: Path, held_path: Path, settings: CorpusSettings) -> None:
    """Write the corpus as JSON lines, one `Document` a line, and the held documents alone to a second file."""
    documents = list(_documents(settings))
    held: set[str] = set()
    for kind in KINDS:
        eligible = [d for d in documents if d.kind == kind and len(d.text) >= settings.min_document_chars]
        # Ordered by hash, not shuffled: what is drawn for a document depends on (seed, id) alone.
        eligible.sort(key=lambda d: draw(settings.seed, d.id))
        held.update(d.id for d in eligible[: settings.num_held_documents // len(KINDS)])
    rows = [asdict(document) | {"held": document.id in held} for document in documents]
    for file_path, written in ((path, rows), (held_path, [row for row in rows if row["held"]])):
        with atomic_writer(file_path) as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in written)
    num_chars = sum(len(d.text) for d in documents)
    print(f"      {len(documents)} documents, {num_chars / 1e6:.1f} million characters, {len(held)} held for pairs")


def read_corpus(path: Path) -> list[Document]:
    """The documents that `write_corpus` wrote."""
    return [Document(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def _documents(settings: CorpusSettings) -> Iterator[Document]:
    standard_library = Path(sysconfig.get_paths()["stdlib"])
    files = [p for name in MODULES.split() if (p := standard_library / f"{name}.py").exists()]
    with tqdm(total=len(topics) + len(files), desc="      texts", unit="text") as bar:
        for name, text in sorted(topics.items()):
            # Headings lose their rows of asterisks, which would fill the vocabulary with asterisks of every length.
            text = re.sub(r"\n\*{3,}\n", "\n", text)
            yield from _cut("reference", f"reference/{name}", text, r"\n\n+", settings)
            bar.update()
        for file in files:
            name = file.relative_to(standard_library).as_posix()
            yield from _cut("source", f"source/{name}", file.read_text("utf-8"), r"\n\n+(?=[A-Za-z_@#])", settings)
            bar.update()


def _cut(kind: str, name: str, text: str, boundary: str, settings: CorpusSettings) -> Iterator[Document]:
    """Pack pieces between boundaries into documents; a piece beyond the maximum is cut at line ends."""
    pieces: list[str] = []
    for piece in re.split(boundary, text.strip()):
        pieces += _lines_of_at_most(settings.max_document_chars, piece)
    packed = ""
    number = 0
    for piece in pieces:
        if packed and len(packed) + len(piece) + 2 > settings.max_document_chars:
            yield Document(f"{name}#{number}", kind, packed, held=False)
            packed, number = "", number + 1
        packed = f"{packed}\n\n{piece}" if packed else piece
    if packed:
        yield Document(f"{name}#{number}", kind, packed, held=False)


def _lines_of_at_most(max_chars: int, piece: str) -> list[str]:
    parts = [""]
    for line in piece.splitlines(keepends=True):
        if parts[-1] and len(parts[-1]) + len(line) > max_chars:
            parts.append("")
        parts[-1] += line[:max_chars]
    return [part.rstrip() for part in parts if part.strip()]
