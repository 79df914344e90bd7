"""Single tensors into and out of Megatron's ``torch_dist`` checkpoints, so that a model never lies in memory whole.

The format is that of ``torch.distributed.checkpoint``: ``.metadata`` says in which ``.distcp`` file every rectangle of
every tensor lies. Layers are stacked: layer n of ``decoder.layers.self_attention.linear_qkv.weight`` is its row n.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    FileSystemReader,
    FileSystemWriter,
    LoadPlan,
    Metadata,
    SavePlan,
    SavePlanner,
    save,
)
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_longpo.conversion.layouts import Shape

FILE_BYTES = 4 << 30
"""A file takes no further tensors beyond this size."""


@dataclass(frozen=True)
class Place:
    """Where a parameter lies in a checkpoint.

    Args:
        key: Name of the stored tensor.
        layer: Row of the stack of layers, or None outside the layers.
        num_layers: Height of the stack.
    """

    key: str
    layer: int | None = None
    num_layers: int = 0

    def box(self, shape: Shape) -> ChunkStorageMetadata:
        """The rectangle of a parameter of this shape."""
        if self.layer is None:
            return ChunkStorageMetadata(torch.Size([0] * len(shape)), torch.Size(shape))
        return ChunkStorageMetadata(torch.Size([self.layer] + [0] * len(shape)), torch.Size([1, *shape]))

    def stored_shape(self, shape: Shape) -> torch.Size:
        """Shape of the whole stored tensor."""
        return torch.Size(shape if self.layer is None else (self.num_layers, *shape))


@dataclass(frozen=True)
class LazyTensor:
    """A parameter that is made when it is written.

    Args:
        place, shape, dtype: What is written.
        make: Gives it.
    """

    place: Place
    shape: Shape
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]

    @property
    def num_bytes(self) -> int:
        """Size of its values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_tensors(
    folder: Path, tensors: Sequence[LazyTensor], object_names: Iterable[str], progress: Callable[[int], Any]
) -> None:
    """Write parameters one at a time, and objects that are all None (Transformer Engine's empty states).

    Peak memory is that of the largest parameter. All files are on the disk when this returns.

    Args:
        folder: Exists.
        tensors: In the order to write.
        object_names: Unique keys of Megatron's ``ShardedObject``.
        progress: Called with the bytes of every parameter written.
    """
    planner = _LazyPlanner(tensors, object_names, progress)
    save({}, storage_writer=_OneByOneWriter(folder), planner=planner, no_dist=True)


class _LazyPlanner(SavePlanner):
    """Plans what `write_tensors` was given; ``resolve_data`` makes a parameter at the moment of writing."""

    def __init__(
        self, tensors: Sequence[LazyTensor], object_names: Iterable[str], progress: Callable[[int], Any]
    ) -> None:
        self.object_names, self.progress = list(object_names), progress
        self.tensors = {self._index(tensor): tensor for tensor in tensors}

    @staticmethod
    def _index(tensor: LazyTensor) -> MetadataIndex:
        return MetadataIndex(tensor.place.key, tensor.place.box(tensor.shape).offsets)

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        items = [WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in self.object_names]
        for index, tensor in self.tensors.items():
            data = TensorWriteData(
                chunk=tensor.place.box(tensor.shape),
                properties=TensorProperties(dtype=tensor.dtype),
                size=tensor.place.stored_shape(tensor.shape),
            )
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            buffer = io.BytesIO()
            torch.save([None], buffer)
            return buffer
        tensor = self.tensors[write_item.index]
        value = tensor.make().to(tensor.dtype)
        assert tuple(value.shape) == tensor.shape, (write_item.index, value.shape, tensor.shape)
        # A slice of a file maps all of it, and a stored view would take all of its storage along.
        if not value.is_contiguous() or value.untyped_storage().nbytes() != value.nbytes:
            value = value.clone(memory_format=torch.contiguous_format)
        self.progress(value.nbytes)
        return value.view(torch.Size([1] * (len(tensor.place.stored_shape(tensor.shape)) - value.dim())) + value.shape)


class _OneByOneWriter(FileSystemWriter):
    """torch's writer keeps every tensor of a file in memory until the file is closed; this one keeps none."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        for number, items in enumerate(_files(plan.items)):
            name = f"__0_{number}.distcp"
            with open(Path(self.path) / name, "wb") as file:
                for item in items:
                    offset = file.tell()
                    data = planner.resolve_data(item)
                    if isinstance(data, io.BytesIO):
                        file.write(data.getbuffer())
                    else:
                        torch.save(data, file)
                    length = file.tell() - offset
                    results.append(WriteResult(item.index, length, _StorageInfo(name, offset, length)))
                    del data
                file.flush()
                os.fsync(file.fileno())
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


def _files(items: list[WriteItem]) -> Iterator[list[WriteItem]]:
    """The items of every file, in order."""
    group: list[WriteItem] = []
    size = 0
    for item in items:
        group.append(item)
        size += item.tensor_storage_size() or 0
        if size >= FILE_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


class TensorReader:
    """Reads single parameters of a checkpoint that any number of ranks wrote.

    Raises:
        ValueError: The metadata is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader = FileSystemReader(folder)
        self._metadata = _read_metadata(folder)
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
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
        target = torch.empty(box.sizes, dtype=stored.properties.dtype)
        items = create_read_items_for_chunk_list(place.key, stored, [box])
        self._reader.read_data(LoadPlan(items), _IntoTensor(target)).wait()
        return target if place.layer is None else target[0]


class _IntoTensor(DefaultLoadPlanner):
    """Puts every rectangle that is read where it belongs in one tensor."""

    def __init__(self, target: torch.Tensor) -> None:
        super().__init__()
        self.target = target

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        part = self.target
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(axis, start, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass


class _MetadataUnpickler(pickle.Unpickler):
    """Makes the classes that checkpoint metadata is made of, and nothing else: a checkpoint may come from anywhere."""

    _PACKAGES = ("torch.distributed.checkpoint.", "megatron.core.dist_checkpointing.")

    def find_class(self, module: str, name: str) -> Any:
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
    try:
        with open(path, "rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: {folder} is not a complete torch_dist checkpoint") from None
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError) as error:
        raise ValueError(f"{path} is damaged or not checkpoint metadata: {error}") from error
    if not isinstance(metadata, Metadata):
        raise ValueError(f"{path} holds a {type(metadata).__name__}, not checkpoint metadata")
    return metadata
