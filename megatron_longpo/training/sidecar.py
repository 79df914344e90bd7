"""Reference log-probs on disk: computed once, before training, and read with every batch.

PREFIX.reference-short/              longpo, sft-chosen-constraint: every turn alone on its short prompt
PREFIX.reference-long-joint/         dpo: the training rows themselves (long-independent for independent turns)
    logps.npy                        fp32 [total]: per document, per turn: chosen tokens, then rejected tokens
    lengths.npy                      int64 [num_pairs, 3]: document number, chosen length, rejected length
    manifest.json                    what it was made from; written last
    parts/                           finished parts of a pass that was interrupted
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from megatron_longpo.files import atomic_writer, write_json

SCHEMA = 1
TurnLogps = list[tuple[NDArray[np.float32], NDArray[np.float32]]]
"""Per turn of a document: log-probs of the chosen and of the rejected response's tokens."""


@dataclass(frozen=True)
class ReferenceKey:
    """What reference log-probs depend on.

    Args:
        kind: ``short``, ``long-joint`` or ``long-independent``.
        dataset: Hash of the dataset.
        weights: `weights_fingerprint` of the reference model, and `rope_scaling_mark` if its RoPE is scaled.
        rotary_base: RoPE base of the reference model.
        dtype: ``bf16`` or ``fp32``.
        window_tokens: Tokens that a token of the reference model sees; None, also of older manifests, is all.
    """

    kind: str
    dataset: str
    weights: str
    rotary_base: float
    dtype: str
    window_tokens: int | None = None

    def check(self, other: dict[str, object], folder: Path) -> None:
        """Raise ValueError if a manifest was made from something else."""
        ours = asdict(self)
        if other.get("schema") != SCHEMA:
            raise ValueError(f"{folder}/manifest.json: schema {other.get('schema')!r} is not {SCHEMA}: delete {folder}")
        different = [f"{k} {other.get(k)!r} instead of {v!r}" for k, v in ours.items() if other.get(k) != v]
        if different:
            raise ValueError(
                f"the reference log-probs in {folder} were made from something else: {'; '.join(different)}. Delete "
                "that folder to compute them again, or keep both with another --reference-dir"
            )


def sidecar_folder(data_path: str, kind: str, reference_dir: str | None) -> Path:
    """Where the sidecar of a dataset lies."""
    prefix = Path(data_path)
    parent = Path(reference_dir) if reference_dir else prefix.parent
    return parent / f"{prefix.name}.reference-{kind}"


class ReferenceLogprobs:
    """Finished reference log-probs of a dataset.

    Args:
        folder: What `sidecar_folder` gives.
        key: What they must have been made from.

    Raises:
        ValueError: They were made from something else, or a file is broken.
        FileNotFoundError: There are none.
    """

    def __init__(self, folder: Path, key: ReferenceKey) -> None:
        manifest_path = folder / "manifest.json"
        manifest = _read_json(manifest_path)
        key.check(manifest, folder)
        try:
            self.logps = np.load(folder / "logps.npy", mmap_mode="r", allow_pickle=False)
            lengths = np.load(folder / "lengths.npy", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{folder} is damaged ({error}): delete it to compute it again") from error
        if not _fit(manifest, lengths, self.logps):
            raise ValueError(
                f"{folder} is damaged: its {len(self.logps)} log-probs, lengths and manifest do not fit together; "
                "delete it to compute it again"
            )
        self.lengths = lengths
        self.pair_starts = np.concatenate([[0], np.cumsum(lengths[:, 1:].sum(axis=1))])
        self.first_pair = np.searchsorted(lengths[:, 0], np.arange(manifest["num_documents"] + 1))

    def of(self, number: int) -> TurnLogps:
        """The log-probs of one document, by its number in the dataset."""
        turns: TurnLogps = []
        for pair in range(self.first_pair[number], self.first_pair[number + 1]):
            start, (_, chosen, rejected) = self.pair_starts[pair], self.lengths[pair]
            middle = start + chosen
            turns.append((np.array(self.logps[start:middle]), np.array(self.logps[middle : middle + rejected])))
        return turns


class SidecarWriter:
    """Collects log-probs part by part; what was added and flushed survives a kill.

    Args:
        folder: What `sidecar_folder` gives.
        key: What they are made from; parts of an earlier, interrupted pass are used if theirs is the same.
        num_documents: Documents of the dataset.

    Raises:
        ValueError: The folder holds finished log-probs that were made from something else.
    """

    def __init__(self, folder: Path, key: ReferenceKey, num_documents: int) -> None:
        self.folder, self.key, self.num_documents = folder, key, num_documents
        self.parts = folder / "parts"
        self.pending: dict[int, TurnLogps] = {}
        if (folder / "manifest.json").exists():
            key.check(_read_json(folder / "manifest.json"), folder)  # of a pass that ended just now
        key_file = self.parts / "key.json"
        if not (key_file.exists() and _read_json(key_file) == self._manifest()):
            # Parts without a key are of no known model: a kill stopped their removal.
            shutil.rmtree(self.parts, ignore_errors=True)
            write_json(key_file, self._manifest())

    def finished(self) -> set[int]:
        """Numbers of the documents that earlier passes finished."""
        done: set[int] = set()
        for part in self.parts.glob("*.npz"):
            lengths, _ = _read_part(part)
            done.update(lengths[:, 0].tolist())
        return done

    def add(self, number: int, turns: TurnLogps) -> None:
        """Take one document's log-probs."""
        self.pending[number] = turns

    def flush(self) -> None:
        """Write what was added since the last flush as one part."""
        if not self.pending:
            return
        lengths, logps = _packed(self.pending)
        with atomic_writer(self.parts / f"{lengths[0, 0]:09d}.npz", binary=True) as file:
            np.savez(file, lengths=lengths, logps=logps)
        self.pending.clear()

    def finish(self) -> None:
        """Put all parts together, write the manifest last, remove the parts.

        Raises:
            ValueError: A document is missing.
        """
        self.flush()
        documents: dict[int, TurnLogps] = {}
        for part in sorted(self.parts.glob("*.npz")):
            _unpack(*_read_part(part), documents)
        missing = sorted(set(range(self.num_documents)) - documents.keys())
        if missing:
            raise ValueError(f"{self.folder}: {len(missing)} documents have no reference log-probs, first {missing[0]}")
        lengths, logps = _packed(documents)
        for name, array in (("lengths", lengths), ("logps", logps)):
            with atomic_writer(self.folder / f"{name}.npy", binary=True) as file:
                np.save(file, array)
        write_json(self.folder / "manifest.json", self._manifest() | {"num_tokens": len(logps)})
        shutil.rmtree(self.parts)

    def _manifest(self) -> dict[str, object]:
        return {"schema": SCHEMA, **asdict(self.key), "num_documents": self.num_documents}


def _packed(documents: dict[int, TurnLogps]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    rows, arrays = [], []
    for number in sorted(documents):
        for chosen, rejected in documents[number]:
            rows.append((number, len(chosen), len(rejected)))
            arrays += [chosen, rejected]
    return np.array(rows, dtype=np.int64), np.concatenate(arrays).astype(np.float32)


def _unpack(lengths: NDArray[np.int64], logps: NDArray[np.float32], into: dict[int, TurnLogps]) -> None:
    start = 0
    for number, chosen, rejected in lengths.tolist():
        middle = start + chosen
        into.setdefault(number, []).append((logps[start:middle], logps[middle : middle + rejected]))
        start = middle + rejected


def _fit(manifest: dict[str, Any], lengths: NDArray[Any], logps: NDArray[Any]) -> bool:
    """Whether the files of a finished sidecar are what `SidecarWriter.finish` writes: every document, in order."""
    if lengths.dtype != np.int64 or lengths.shape[1:] != (3,) or logps.dtype != np.float32 or logps.ndim != 1:
        return False
    numbers, of_responses = lengths[:, 0], lengths[:, 1:]
    documents = np.unique(numbers).tolist()
    return (
        manifest.get("num_tokens") == len(logps) == of_responses.sum()
        and manifest.get("num_documents") == len(documents)
        and documents == list(range(len(documents)))
        and bool((np.diff(numbers) >= 0).all() and (of_responses >= 0).all())
    )


def _read_part(part: Path) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    try:
        with np.load(part, allow_pickle=False) as arrays:
            return arrays["lengths"], arrays["logps"]
    except (OSError, ValueError, EOFError, KeyError, BadZipFile) as error:
        raise ValueError(f"{part} is damaged ({error}): delete it to compute its documents again") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON object ({error}): delete {path.parent} to compute it again") from error
    return content
