"""Writing safetensors shards tensor by tensor. The library's own writer wants a whole shard in memory.

A file is the header's length (8 bytes, little-endian), the header (JSON: type, shape and byte range of every tensor)
and the tensors' bytes, one after another.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch

from megatron_longpo.conversion.hf_weights import DTYPES
from megatron_longpo.conversion.layouts import Shape

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that will be written."""

    name: str
    shape: Shape
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size of its values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class ShardedWriter:
    """Writes announced tensors, in the announced order, into as few files as a size limit allows.

    Use it as a context manager. One file is called ``model.safetensors``; several are numbered and get an index.

    Args:
        folder: Exists.
        tensors: What will be written.
        max_shard_bytes: Limit of a file; a tensor that is larger gets a file of its own.
    """

    def __init__(self, folder: Path, tensors: Sequence[TensorSpec], max_shard_bytes: int) -> None:
        self.folder = folder
        self._shards = _shards(tensors, max_shard_bytes)
        total = len(self._shards)
        self._names = (
            ["model.safetensors"]
            if total == 1
            else [f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]
        )
        self._waiting = [(number, spec) for number, shard in enumerate(self._shards) for spec in shard]
        self._waiting.reverse()
        self._current = -1
        self._file: IO[bytes] | None = None

    def __enter__(self) -> ShardedWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close()
        if error is None:
            assert not self._waiting, f"{len(self._waiting)} announced tensors were not written"
            self._write_index()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append the next tensor."""
        number, spec = self._waiting.pop()
        assert (name, tuple(tensor.shape), tensor.dtype) == (spec.name, spec.shape, spec.dtype), (name, spec)
        if number != self._current:
            self._open(number)
        assert self._file is not None
        self._file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)

    def _open(self, number: int) -> None:
        self._close()
        self._current = number
        self._file = open(self.folder / self._names[number], "wb")  # noqa: SIM115 (`_close` closes it)
        self._file.write(_header(self._shards[number]))

    def _close(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def _write_index(self) -> None:
        if len(self._shards) == 1:
            return
        specs = [spec for shard in self._shards for spec in shard]
        places = {spec.name: self._names[n] for n, shard in enumerate(self._shards) for spec in shard}
        index = {
            "metadata": {
                "total_parameters": sum(torch.Size(spec.shape).numel() for spec in specs),
                "total_size": sum(spec.num_bytes for spec in specs),
            },
            "weight_map": dict(sorted(places.items())),
        }
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _shards(tensors: Sequence[TensorSpec], max_shard_bytes: int) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = []
    room = 0
    for spec in tensors:
        if not shards or spec.num_bytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(spec)
        room -= spec.num_bytes
    return shards


def _header(shard: list[TensorSpec]) -> bytes:
    # transformers refuses files that do not say which library's tensors they hold.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in shard:
        end = offset + spec.num_bytes
        header[spec.name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
