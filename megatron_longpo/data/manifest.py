"""``PREFIX.manifest.json``: what a tokenized dataset holds, what made it, and what was left out and why.

It is written last, so token files without one are the remains of a run that did not finish.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from megatron_longpo.data.document import TURNS
from megatron_longpo.files import atomic_writer, dump_json

SCHEMA = 1
"""Version of the manifest and of the token files that it describes."""


@dataclass(frozen=True)
class Manifest:
    """The content of the manifest.

    Args:
        dataset_hash: SHA-256 over every document's token sequences, in order: the key of all that is computed from
            them. It depends on content only, not on workers, paths or time.
        bin_bytes: Size of the .bin file.
        idx_hash: SHA-256 of the .idx file.
        num_documents: Documents stored.
        num_turns: Turns stored, over all documents.
        longest_sequence_tokens: The longest conversation, short prompts included: what ``--seq-length`` must hold.
        max_token_id: Largest token id: a model's vocabulary must be larger.
        row_tokens: For each value of ``--turns`` every document's row length in tokens, chosen and rejected branches
            included; an empty list where some document lacks that kind of conversation.
        tokenizer: How the tokens were made: path, hashes, vocabulary size.
        source: The input files with their sizes and hashes.
        settings: The flags that decide the content.
        dropped: For each reason the samples left out: id, file, line and what explains it.
        truncated: The samples whose document was cut: id, tokens cut, turns whose chunk lost text.
    """

    dataset_hash: str
    bin_bytes: int
    idx_hash: str
    num_documents: int
    num_turns: int
    longest_sequence_tokens: int
    max_token_id: int
    row_tokens: dict[str, list[int]]
    schema: int = SCHEMA
    tokenizer: dict[str, Any] = field(default_factory=dict)
    source: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    dropped: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    truncated: list[dict[str, Any]] = field(default_factory=list)

    @contextmanager
    def saved_last(self, prefix: str | Path) -> Iterator[None]:
        """Write it beside the token files, which get their names in the block.

        It is on the disk before the block begins: one without room for it keeps an older dataset.
        """
        path = manifest_path(prefix)
        with atomic_writer(path) as file:
            dump_json(asdict(self), file)
            file.flush()
            os.fsync(file.fileno())
            # An older manifest must never stand beside newer tokens.
            path.unlink(missing_ok=True)
            yield

    @staticmethod
    def load(prefix: str | Path) -> Manifest:
        """Read the manifest of a dataset.

        Raises:
            ValueError: It is missing, is not JSON, is of another schema, or a field has another type.
        """
        path = manifest_path(prefix)
        if not path.is_file():
            remains = [name for suffix in (".bin", ".idx") if Path(name := f"{prefix}{suffix}").exists()]
            hint = f" ({' and '.join(remains)} come from a run that did not finish)" if remains else ""
            raise ValueError(
                f"--data-path {prefix}: there is no {path}{hint}: run tools/preprocess_pairs.py --output-prefix "
                f"{prefix}"
            )
        again = "run tools/preprocess_pairs.py again"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON ({error}): {again}") from error
        schema = content.get("schema") if isinstance(content, dict) else None
        if schema != SCHEMA:
            raise ValueError(f"{path}: field 'schema' is {schema!r}, this version reads {SCHEMA}: {again}")
        try:
            manifest = Manifest(**content)
        except TypeError as error:
            raise ValueError(f"{path} has missing or unknown fields ({error}): {again}") from error
        for name, kind in get_type_hints(Manifest).items():
            if not isinstance(value := getattr(manifest, name), get_origin(kind) or kind):
                raise ValueError(f"{path}: field {name!r} cannot be {value!r}: {again}")
        counts = [manifest.row_tokens.get(turns) for turns in TURNS]
        if not all(isinstance(lengths, list) and len(lengths) in (0, manifest.num_documents) for lengths in counts):
            raise ValueError(f"{path}: field 'row_tokens' is not of {manifest.num_documents} documents: {again}")
        return manifest


def manifest_path(prefix: str | Path) -> Path:
    """``PREFIX.manifest.json``."""
    return Path(f"{prefix}.manifest.json")
