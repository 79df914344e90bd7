"""Reading single parameters of a ``torch_dist`` checkpoint that any number of ranks wrote."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, LoadPlan, Metadata
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_longpo.conversion.layouts import Shape
from megatron_longpo.conversion.torch_dist import Place


class TensorReader:
    """The parameters of one checkpoint.

    Raises:
        ValueError: The metadata is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader = FileSystemReader(folder)
        self._metadata = _read_metadata(folder)
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self.tensors: dict[str, TensorStorageMetadata] = {
            key: stored
            for key, stored in self._metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }

    def missing_files(self) -> list[str]:
        """Files that hold rectangles of tensors and are not there, or are shorter than they must be."""
        ends: dict[str, int] = {}
        for stored in (self._metadata.storage_data or {}).values():
            ends[stored.relative_path] = max(ends.get(stored.relative_path, 0), stored.offset + stored.length)
        paths = {name: self.folder / name for name in ends}
        return sorted(name for name, path in paths.items() if not path.is_file() or path.stat().st_size < ends[name])

    def read(self, place: Place, shape: Shape) -> torch.Tensor:
        """One parameter: the first rows, where the stored one is longer (a vocabulary padded for another TP size)."""
        stored = self.tensors[place.key]
        box = place.box(shape)
        target = self._target(box.sizes, stored.properties.dtype)
        planner = _IntoTensor(target)
        for item in create_read_items_for_chunk_list(place.key, stored, [box]):
            if not self._read_plain(item, planner.resolve_tensor(item)):
                self._reader.read_data(LoadPlan([item]), planner).wait()
        return target if place.layer is None else target[0]

    def _read_plain(self, item: ReadItem, part: torch.Tensor) -> bool:
        """Read a stored rectangle from its file into its place, without a copy in between, if that is possible.

        Fresh memory costs more time than reading into memory that was used before, and torch.load always takes some.

        Returns:
            Whether it was: the rectangle is wanted whole and stored as it lies in memory.
        """
        info = self._metadata.storage_data[item.storage_index]
        with open(self.folder / info.relative_path, "rb") as file:
            if hasattr(os, "posix_fadvise"):
                # What follows is most likely wanted next; the disk can fetch it while this is written elsewhere.
                os.posix_fadvise(file.fileno(), info.offset + info.length, info.length, os.POSIX_FADV_WILLNEED)
            if getattr(info, "transform_descriptors", None) or not part.is_contiguous():
                return False
            with FakeTensorMode():
                found = torch.load(self._reader._slice_file(file, info), map_location="cpu", weights_only=True)
            offset = getattr(found.untyped_storage(), "_checkpoint_offset", None)
            alike = (found.shape, found.dtype, found.is_contiguous()) == (part.shape, part.dtype, True)
            if not alike or offset is None or found.untyped_storage().nbytes() != part.nbytes:
                return False
            file.seek(info.offset + offset)
            return file.readinto(part.view(-1).view(torch.uint8).numpy().data) == part.nbytes

    def _target(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        size = shape.numel() * dtype.itemsize
        if self._buffer.numel() < size:
            self._buffer = torch.empty(size, dtype=torch.uint8)
        return self._buffer[:size].view(dtype).view(shape)


class _IntoTensor(DefaultLoadPlanner):
    """Puts every rectangle that is read where it belongs in one tensor."""

    def __init__(self, target: torch.Tensor) -> None:
        super().__init__()
        self.target = target

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """The rectangle of the target that an item fills, a view."""
        part = self.target
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(axis, start, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing: torch has read into the view that `resolve_tensor` gave."""


class _MetadataUnpickler(pickle.Unpickler):
    """Makes the classes that checkpoint metadata is made of, and nothing else: a checkpoint may come from anywhere."""

    _PACKAGES = ("torch.distributed.checkpoint.", "megatron.core.dist_checkpointing.")

    def find_class(self, module: str, name: str) -> Any:
        """A class of checkpoint metadata, a dtype or `torch.Size`; UnpicklingError for everything else."""
        if module == "torch":
            found = getattr(torch, name, None)
            if found is torch.Size or isinstance(found, torch.dtype):
                return found
        elif (module, name) == ("torch.serialization", "_get_layout"):
            return super().find_class(module, name)
        elif "." not in name and (module in ("pathlib", "collections") or module.startswith(self._PACKAGES)):
            found = super().find_class(module, name)
            # What a module merely imports is not its own.
            if isinstance(found, type) and found.__module__ == module:
                return found
        raise pickle.UnpicklingError(f"{module}.{name} is no part of checkpoint metadata")


def _read_metadata(folder: Path) -> Metadata:
    path = folder / ".metadata"
    if not path.is_file():
        raise ValueError(f"{path} is missing: {folder} is not a complete torch_dist checkpoint")
    content = io.BytesIO(path.read_bytes())
    try:
        metadata = _MetadataUnpickler(content).load()
    # What a damaged pickle asks for may fail with an error of any type.
    except Exception as error:
        raise ValueError(f"{path} is damaged or not checkpoint metadata: {error}") from error
    if not isinstance(metadata, Metadata):
        raise ValueError(f"{path} holds a {type(metadata).__name__}, not checkpoint metadata")
    return metadata
