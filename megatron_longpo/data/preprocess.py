"""Pairs files to a tokenized dataset: read, tokenize in parallel, drop or cut what is too long, write.

Rows stream: memory holds a few documents per worker, whatever the size of the files. The output does not depend on the
number of workers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_longpo.data.manifest import Manifest
from megatron_longpo.data.outcome import DROP_REASONS, PreprocessOptions, make_worker
from megatron_longpo.data.parallel import ordered_map
from megatron_longpo.data.records import RecordWriter
from megatron_longpo.files import check_folder_writable
from megatron_longpo.pair_formats.raw import TABLE_SUFFIXES, input_files
from megatron_longpo.pairs import read_pairs


def preprocess(options: PreprocessOptions, progress: bool = True) -> Manifest:
    """Write ``OUTPUT_PREFIX.bin``, ``.idx`` and ``.manifest.json``, or nothing.

    Raises:
        ValueError: A flag, a file, a row or the tokenizer is unusable, or no row is left; the message says which and
            what to do.
    """
    files = input_files(options.inputs)
    tokenizer = options.tokenizer.load()
    check_folder_writable(Path(options.output_prefix).parent, "--output-prefix")
    sources = [_describe_source(file) for file in files]
    num_rows = None if any(s["rows"] is None for s in sources) else sum(s["rows"] for s in sources)
    dropped: dict[str, list[dict[str, Any]]] = {reason: [] for reason in DROP_REASONS}
    truncated: list[dict[str, Any]] = []
    outcomes = ordered_map(make_worker, (options,), read_pairs(options.inputs), options.num_workers)
    with closing(outcomes), RecordWriter(options.output_prefix) as writer:
        bar = tqdm(outcomes, total=num_rows, desc="tokenize", unit="document", disable=not progress, smoothing=0.1)
        for outcome in bar:
            about = {"id": outcome.id, **(asdict(outcome.location) if outcome.location else {})}
            if outcome.document is None:
                dropped[outcome.dropped].append({**about, "num_tokens": outcome.num_tokens})
                continue
            if outcome.truncated is not None:
                truncated.append({**about, **outcome.truncated})
            writer.add(outcome.document)
        if writer.num_documents == 0:
            num_dropped = sum(len(rows) for rows in dropped.values())
            counts = ", ".join(f"{len(rows)} because {DROP_REASONS[name]}" for name, rows in dropped.items() if rows)
            raise ValueError(
                f"all {num_dropped} documents were dropped ({counts}), so {options.output_prefix} is not written; "
                f"raise --max-seq-length, or cut documents with --truncate-document"
            )
        return writer.finish(
            tokenizer={
                "path": tokenizer.path,
                "hash": tokenizer.hash,
                "template_hash": tokenizer.template_hash,
                "template": tokenizer.template,
                "vocab_size": tokenizer.vocab_size,
                "eos_id": tokenizer.eos_id,
            },
            source=sources,
            settings={
                "max_seq_length": options.max_seq_length,
                "truncate_document": options.truncate_document,
                "prompt_template": options.prompt_template,
                "turns": options.turns,
            },
            dropped={reason: rows for reason, rows in dropped.items() if rows},
            truncated=truncated,
        )


def summary_table(manifest: Manifest) -> str:
    """What was written and what was left out, as aligned lines."""
    lengths = next((lengths for lengths in manifest.row_tokens.values() if lengths), [])
    num_cut_chunks = sum(len(entry["turns_with_cut_chunk"]) for entry in manifest.truncated)
    rows: list[tuple[str, int | str]] = [
        ("documents written", manifest.num_documents),
        ("turns written", manifest.num_turns),
        ("tokens in training rows", sum(lengths)),
        ("median row", int(np.median(lengths)) if lengths else 0),
        ("longest row", max(lengths, default=0)),
        ("longest conversation (--seq-length)", manifest.longest_sequence_tokens),
        ("documents cut", len(manifest.truncated)),
        ("turns whose chunk lost text", num_cut_chunks),
    ]
    rows += [(f"dropped: {DROP_REASONS[name]}", len(manifest.dropped.get(name, ()))) for name in DROP_REASONS]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value:>16,}" for name, value in rows)


def _describe_source(file: Path) -> dict[str, Any]:
    """Name, size, hash and number of rows of an input file; the rows are None where only reading would tell."""
    digest = hashlib.sha256()
    num_lines = 0
    last = b"\n"
    for block in _blocks(file):
        digest.update(block)
        num_lines += block.count(b"\n")
        last = block[-1:]
    return {
        "file": str(file),
        "bytes": file.stat().st_size,
        "hash": digest.hexdigest(),
        "rows": None if file.suffix in (*TABLE_SUFFIXES, ".json", ".gz") else num_lines + (last != b"\n"),
    }


def _blocks(file: Path) -> Iterator[bytes]:
    with open(file, "rb") as content:
        while block := content.read(1 << 20):
            yield block
