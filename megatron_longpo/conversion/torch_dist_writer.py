"""Writing a ``torch_dist`` checkpoint parameter by parameter, so that a model never lies in memory whole."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint import FileSystemWriter, Metadata, SavePlan, SavePlanner, save
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.utils.serialization import config

from megatron_longpo.conversion.layouts import Shape
from megatron_longpo.conversion.torch_dist import Place

FILE_BYTES = 4 << 30
"""A file takes no further tensors beyond this size."""


@dataclass(frozen=True)
class LazyTensor:
    """A parameter that is made when it is written.

    Args:
        place, shape, dtype: What is written.
        fill: Writes its values over a tensor of that shape and type.
    """

    place: Place
    shape: Shape
    dtype: torch.dtype
    fill: Callable[[torch.Tensor], None]

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
    try:
        save({}, storage_writer=_OneByOneWriter(folder), planner=planner, no_dist=True)
    except CheckpointException as error:
        # A BaseException around whatever happened, Ctrl-C included.
        cause, _ = next(iter(error.failures.values()))
        raise cause from None


class _LazyPlanner(SavePlanner):
    """Plans what `write_tensors` was given; ``resolve_data`` makes a parameter at the moment of writing.

    All are made in the same memory: the system hands out fresh pages more slowly than it copies into used ones.
    """

    def __init__(
        self, tensors: Sequence[LazyTensor], object_names: Iterable[str], progress: Callable[[int], Any]
    ) -> None:
        self.object_names, self.progress = list(object_names), progress
        self.tensors = {self._index(tensor): tensor for tensor in tensors}
        self._memory = np.empty(max((tensor.num_bytes for tensor in tensors), default=0), dtype=np.uint8)

    @staticmethod
    def _index(tensor: LazyTensor) -> MetadataIndex:
        return MetadataIndex(tensor.place.key, tensor.place.box(tensor.shape).offsets)

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """Nothing: what is written was given when the planner was made, not as a state dictionary."""

    def create_local_plan(self) -> SavePlan:
        """One item for every object's name and for every tensor's box in what is stored."""
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
        """torch's default, of the only rank: plans without duplicates and the metadata of all tensors."""
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """The plan as it is."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """Bytes of ``[None]`` for an object; a tensor, valid until the next call, in the shape of its place."""
        if write_item.type == WriteItemType.BYTE_IO:
            buffer = io.BytesIO()
            torch.save([None], buffer)
            return buffer
        tensor = self.tensors[write_item.index]
        # torch stores all of a tensor's storage, so it gets one of its own size over the shared memory.
        value = torch.from_numpy(self._memory[: tensor.num_bytes]).view(tensor.dtype).view(tensor.shape)
        tensor.fill(value)
        self.progress(value.nbytes)
        return value.view(torch.Size([1] * (len(tensor.place.stored_shape(tensor.shape)) - value.dim())) + value.shape)


class _OneByOneWriter(FileSystemWriter):
    """torch's writer keeps every tensor of a file in memory until the file is closed; this one keeps none."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write every item as soon as it is made, files of at least `FILE_BYTES` each, and wait for the disk."""
        results: list[WriteResult] = []
        for number, items in enumerate(_files(plan.items)):
            name = f"__0_{number}.distcp"
            # Nothing reads the checksums that torch would compute.
            with open(Path(self.path) / name, "wb") as file, config.patch("save.compute_crc32", False):  # type: ignore[attr-defined]
                for item in items:
                    offset = file.tell()
                    data = planner.resolve_data(item)
                    if isinstance(data, io.BytesIO):
                        file.write(data.getbuffer())
                    else:
                        torch.save(data, file)
                    length = file.tell() - offset
                    results.append(WriteResult(item.index, length, _StorageInfo(name, offset, length)))
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
