"""Tokenized documents on disk: ``PREFIX.bin`` and ``PREFIX.idx``, Megatron's IndexedDataset with int32 tokens.

One document of the IndexedDataset is one sample, and its sequences are, in order:

    header · document tokens · [joint chosen · joint rejected] · [chosen · rejected of every independent turn]
    · [prefix · chosen · rejected of every short prompt]

The header says which of the bracketed ones follow and where the responses lie in every branch. For a document of one
turn the joint and the independent conversation are the same and are stored once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

import megatron_longpo.platform  # noqa: F401  before anything of Megatron-Core

# isort: split
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_longpo.data.document import TURNS, Branch, ShortPrompt, TokenizedDocument, Tokens
from megatron_longpo.data.manifest import SCHEMA, Manifest, manifest_path
from megatron_longpo.data.rows import training_row
from megatron_longpo.files import file_hash, name_file, replace_file, sync_file, temporary_name
from megatron_longpo.processes import uninterrupted

_HAS_JOINT, _HAS_INDEPENDENT, _HAS_SHORT = 1, 2, 4


class RecordWriter:
    """Writes documents one by one; nothing takes its final name before `finish`.

    Use as a context manager: leaving the block without `finish`, by an error or by Ctrl-C, removes what was written
    and leaves an older dataset of the same name as it was.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._temporary_bin = temporary_name(f"{prefix}.bin")
        self._temporary_idx = temporary_name(f"{prefix}.idx")
        self._builder = IndexedDatasetBuilder(str(self._temporary_bin), dtype=np.int32)
        self._digest = hashlib.sha256()
        self._row_tokens: dict[str, list[int]] = {turns: [] for turns in TURNS}
        self.num_documents = self._num_turns = self._longest = self._max_token_id = 0

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._builder.data_file.close()
        except OSError as full:
            name_file(full, f"{self.prefix}.bin")
            raise
        finally:
            name_file(error, f"{self.prefix}.bin")
            # Closing writes what is buffered, which fails again on a full disk.
            self._temporary_bin.unlink(missing_ok=True)
            self._temporary_idx.unlink(missing_ok=True)

    def add(self, document: TokenizedDocument) -> None:
        """Append one document."""
        for sequence in _to_sequences(document):
            self._builder.add_item(torch.from_numpy(sequence))
            self._digest.update(len(sequence).to_bytes(8, "little"))
            self._digest.update(sequence.tobytes())
        self._builder.end_document()
        self.num_documents += 1
        self._num_turns += document.num_turns
        self._longest = max(self._longest, document.longest_sequence_tokens, document.longest_short_tokens)
        self._max_token_id = max(self._max_token_id, *(int(t.max()) for t in document.all_tokens() if len(t)))
        if document.joint is not None:
            self._row_tokens["joint"].append(training_row(document, "joint").num_tokens)
        if document.independent:
            self._row_tokens["independent"].append(training_row(document, "independent").num_tokens)

    def finish(self, **about: Any) -> Manifest:
        """Give the files their names, the manifest last.

        Args:
            about: The fields of `Manifest` that say where the documents came from.

        Raises:
            ValueError: No document was added.
        """
        if not self.num_documents:
            raise ValueError(f"no document is left to write to {self.prefix}.bin")
        self._builder.finalize(str(self._temporary_idx))
        # What the disk has no room for shows before the older dataset goes.
        for temporary in (self._temporary_bin, self._temporary_idx):
            sync_file(temporary)
        manifest = Manifest(
            dataset_hash=self._digest.hexdigest(),
            bin_bytes=self._temporary_bin.stat().st_size,
            idx_hash=file_hash(self._temporary_idx),
            num_documents=self.num_documents,
            num_turns=self._num_turns,
            longest_sequence_tokens=self._longest,
            max_token_id=self._max_token_id,
            row_tokens={t: n if len(n) == self.num_documents else [] for t, n in self._row_tokens.items()},
            **about,
        )
        # The older dataset goes and the new one takes its place.
        with uninterrupted(), manifest.saved_last(self.prefix):
            replace_file(self._temporary_bin, f"{self.prefix}.bin")
            replace_file(self._temporary_idx, f"{self.prefix}.idx")
        return manifest


class RecordReader:
    """Random access to the documents of a dataset, memory-mapped.

    Raises:
        ValueError: Files are missing, truncated, or do not belong to the manifest.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        self.manifest = Manifest.load(prefix)
        bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        again = "restore the file or run tools/preprocess_pairs.py again"
        for path in (bin_path, idx_path):
            if not path.is_file():
                raise ValueError(f"--data-path {prefix}: {path} is missing: {again}")
        if bin_path.stat().st_size != self.manifest.bin_bytes:
            raise ValueError(
                f"{bin_path} has {bin_path.stat().st_size} bytes and its manifest says {self.manifest.bin_bytes}: it "
                f"is truncated or of another dataset; {again}"
            )
        if file_hash(idx_path) != self.manifest.idx_hash:
            raise ValueError(f"{idx_path} is not the index that {manifest_path(prefix)} describes: {again}")
        self._dataset = IndexedDataset(str(prefix), mmap=True)
        if len(self._dataset.document_indices) != len(self) + 1:
            raise ValueError(f"{manifest_path(prefix)} counts {len(self)} documents, its index does not: {again}")

    def __len__(self) -> int:
        return self.manifest.num_documents

    def __getitem__(self, number: int) -> TokenizedDocument:
        if not 0 <= number < len(self):
            raise IndexError(f"{self.prefix} has documents 0 to {len(self) - 1}, not {number}")
        with self._damage_named(number):
            sequences = self._sequences(number)
            _, *tokens = sequences
            if any(len(t) and not 0 <= t.min() <= t.max() <= self.manifest.max_token_id for t in tokens):
                raise ValueError(f"it has a token id outside of 0 to {self.manifest.max_token_id}")
            return _from_sequences(sequences)

    def document_id(self, number: int) -> str:
        """The id of one document, without reading its tokens."""
        with self._damage_named(number):
            return _decode_header(self._dataset[int(self._dataset.document_indices[number])])[0]

    def conversation_tokens(self, number: int, turns: str, roles: Sequence[int]) -> int:
        """Tokens of one document's longest conversation, of what ``training_row`` would take, without reading them."""
        first, stop = (int(index) for index in self._dataset.document_indices[number : number + 2])
        with self._damage_named(number):
            _, flags, num_turns, _ = _decode_header(self._dataset[first])
            _, document, *branches = self._dataset.sequence_lengths[first:stop].tolist()
            pair_at = 2 if turns == "independent" and flags & _HAS_JOINT and num_turns > 1 else 0
            num_pairs = num_turns if turns == "independent" else 1
            return document + max(branches[pair_at + 2 * pair + role] for pair in range(num_pairs) for role in roles)

    def verify(self) -> None:
        """Read everything and compare it with the manifest's hash.

        Raises:
            ValueError: The tokens were changed.
        """
        digest = hashlib.sha256()
        for number in range(len(self)):
            for sequence in self._sequences(number):
                digest.update(len(sequence).to_bytes(8, "little"))
                digest.update(sequence.tobytes())
        if digest.hexdigest() != self.manifest.dataset_hash:
            raise ValueError(
                f"{self.prefix}.bin does not have the content that {manifest_path(self.prefix)} describes: restore the "
                f"file or run tools/preprocess_pairs.py again"
            )

    @contextmanager
    def _damage_named(self, number: int) -> Iterator[None]:
        """Name the file whose content cannot be what was written; only `verify` finds every change."""
        try:
            yield
        except (ValueError, IndexError) as error:
            raise ValueError(
                f"{self.prefix}.bin is damaged at document {number} ({error}): restore the file or run "
                "tools/preprocess_pairs.py again"
            ) from error

    def _sequences(self, number: int) -> list[Tokens]:
        first, stop = (int(index) for index in self._dataset.document_indices[number : number + 2])
        # Copies: the mapping may close before the last array that was read from it is gone.
        return [np.array(sequence) for sequence in self._dataset[first:stop]]


def _stored_branches(document: TokenizedDocument) -> Iterator[Branch]:
    once = document.num_turns == 1 and document.joint is not None and len(document.independent) == 1
    assert not once or document.joint == document.independent[0], "one turn: joint and independent are the same"
    if document.joint is not None:
        yield from document.joint
    for pair in () if once else document.independent:
        yield from pair
    for short in document.short:
        yield short.chosen
        yield short.rejected


def _to_sequences(document: TokenizedDocument) -> Iterator[Tokens]:
    yield _encode_header(document)
    yield document.document_tokens
    branches = list(_stored_branches(document))
    num_short_branches = 2 * len(document.short)
    for branch in branches[: len(branches) - num_short_branches]:
        yield branch.tokens
    for short in document.short:
        yield from (short.prefix_tokens, short.chosen.tokens, short.rejected.tokens)


def _encode_header(document: TokenizedDocument) -> Tokens:
    """int32: schema, flags, turns, bytes of the id; for each branch its span count and spans; the id in UTF-8."""
    flags = (
        _HAS_JOINT * (document.joint is not None)
        + _HAS_INDEPENDENT * bool(document.independent)
        + _HAS_SHORT * bool(document.short)
    )
    id_bytes = document.id.encode("utf-8")
    numbers = [SCHEMA, flags, document.num_turns, len(id_bytes)]
    for branch in _stored_branches(document):
        numbers += [len(branch.spans), *(number for span in branch.spans for number in span)]
    padded = id_bytes + b"\0" * (-len(id_bytes) % 4)
    return np.concatenate([np.array(numbers, dtype=np.int32), np.frombuffer(padded, dtype="<i4").astype(np.int32)])


def _decode_header(header: Tokens) -> tuple[str, int, int, list[tuple[tuple[int, int, int], ...]]]:
    """The id, the flags, the number of turns and the spans of every stored branch."""
    schema, flags, num_turns, num_id_bytes, *_ = (int(number) for number in header[:4])
    if schema != SCHEMA:
        raise ValueError(f"a document's header has schema {schema}, this version reads {SCHEMA}: preprocess again")
    num_words = -(-num_id_bytes // 4)
    stop = len(header) - num_words
    document_id = header[stop:].astype("<i4").tobytes()[:num_id_bytes].decode("utf-8")
    spans, at = [], 4
    while at < stop:
        num_spans = int(header[at])
        if not 0 <= num_spans <= (stop - at) // 3:
            raise ValueError(f"its header counts {num_spans} responses in a branch")
        triples = header[at + 1 : at + 1 + 3 * num_spans].reshape(-1, 3).tolist()
        spans.append(tuple((turn, start, end) for turn, start, end in triples))
        at += 1 + 3 * num_spans
    return document_id, flags, num_turns, spans


def _from_sequences(sequences: Sequence[Tokens]) -> TokenizedDocument:
    document_id, flags, num_turns, all_spans = _decode_header(sequences[0])
    num_pairs = bool(flags & _HAS_JOINT) + num_turns * bool(flags & _HAS_INDEPENDENT)
    if num_turns == 1 and num_pairs == 2:
        num_pairs = 1  # stored once
    num_short = num_turns * bool(flags & _HAS_SHORT)
    if (len(sequences) - 2, len(all_spans)) != (2 * num_pairs + 3 * num_short, 2 * (num_pairs + num_short)):
        raise ValueError(f"its header is not of its {len(sequences)} sequences")
    spans = iter(all_spans)
    pieces = iter(sequences[2:])

    def pair() -> tuple[Branch, Branch]:
        return Branch(next(pieces), next(spans)), Branch(next(pieces), next(spans))

    joint = pair() if flags & _HAS_JOINT else None
    independent: tuple[tuple[Branch, Branch], ...] = ()
    if flags & _HAS_INDEPENDENT:
        independent = (joint,) if joint is not None and num_turns == 1 else tuple(pair() for _ in range(num_turns))
    short: tuple[ShortPrompt, ...] = ()
    if flags & _HAS_SHORT:
        short = tuple(ShortPrompt(next(pieces), *pair()) for _ in range(num_turns))
    return TokenizedDocument(document_id, sequences[1], joint, independent, short)
