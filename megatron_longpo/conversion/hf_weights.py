"""Reading single tensors and slices of them from the weight files of a Hugging Face folder."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_longpo.conversion.layouts import Shape, Sliceable

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Types of weights that can be converted, by safetensors' names."""

_INDEX_SUFFIX = ".index.json"


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies, and its type and shape."""

    path: Path
    dtype: torch.dtype
    shape: Shape

    @property
    def num_bytes(self) -> int:
        """Size of its values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class HFWeights:
    """The tensors of a Hugging Face folder, opened when they are first sliced.

    Opening reads the headers of all files, so a missing or truncated file is found before any work.

    Args:
        folder: Holds ``model.safetensors``, or shards with ``model.safetensors.index.json``, or the same as
            ``pytorch_model.bin``, which is unpickled with ``weights_only``.

    Raises:
        ValueError: No weights, a missing or damaged file, or tensors that are no float weights.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._open: dict[Path, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for path, names in _weight_files(self.folder).items():
            found = self._headers(path)
            missing = sorted(set(names or ()) - set(found))
            if missing:
                raise ValueError(f"{path} lacks tensors that the index names: {listed(missing)}")
            self.tensors |= found
        self.release()

    def __enter__(self) -> HFWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __getitem__(self, name: str) -> Sliceable:
        path = self.tensors[name].path
        file = self._file(path)
        return file[name] if isinstance(file, dict) else file.get_slice(name)

    def release(self) -> None:
        """Close all files, so that pages of them that were read no longer count as this process's memory."""
        self._open.clear()

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = _open_file(path)
        return self._open[path]

    def _headers(self, path: Path) -> dict[str, TensorInfo]:
        file = self._file(path)
        if isinstance(file, dict):
            kinds = {name: (value.dtype, tuple(value.shape)) for name, value in file.items()}
        else:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
            kinds = {
                name: (DTYPES.get(part.get_dtype(), part.get_dtype()), tuple(part.get_shape()))
                for name, part in slices.items()
            }
        wrong = [f"{name} ({dtype})" for name, (dtype, _) in kinds.items() if dtype not in DTYPES.values()]
        if wrong:
            raise ValueError(f"{path} has tensors that are not float32, bfloat16 or float16: {listed(wrong)}")
        return {name: TensorInfo(path, dtype, shape) for name, (dtype, shape) in kinds.items()}


def listed(names: Iterable[str]) -> str:
    """Names for an error message: all, or the first 20 and how many more."""
    names = list(names)
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return ", ".join(names[:20]) + more


def _weight_files(folder: Path) -> dict[Path, list[str] | None]:
    """The files with weights, and the names of the tensors that the index says are in each, where there is one."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / (name + _INDEX_SUFFIX)
        if index.is_file():
            return _files_of_index(index)
        if (folder / name).is_file():
            return {folder / name: None}
    raise ValueError(
        f"{folder} holds no weights: expected model.safetensors, model.safetensors{_INDEX_SUFFIX} with its shards, or "
        "pytorch_model.bin"
    )


def _files_of_index(index: Path) -> dict[Path, list[str] | None]:
    try:
        places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        outside = sorted({place for place in places.values() if Path(place).name != place})
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of weights with a weight_map: {error!r}") from error
    if outside:
        raise ValueError(f"{index} names files outside its folder: {listed(outside)}")
    files: dict[Path, list[str] | None] = {}
    for place in sorted(set(places.values())):
        files[index.parent / place] = [name for name in places if places[name] == place]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise ValueError(f"{index.parent} lacks files that {index.name} names: {listed(missing)}; download them again")
    return files


def _open_file(path: Path) -> Any:
    if path.suffix != ".safetensors":
        return _open_pickle(path)
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error}); download it again") from error


def _open_pickle(path: Path) -> dict[str, torch.Tensor]:
    with open(path, "rb") as file:
        # The first byte of a pickle: torch before 1.6 wrote one after another, and no part could be read alone.
        if file.read(1) == b"\x80":
            raise ValueError(f"{path} is in torch's format before 1.6, which is not read: torch.save its content again")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        # torch's own text is a page, and says how to run what is in the file.
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = found[1] if found else "objects of other types than tensors"
        raise ValueError(
            f"{path} holds more than weights ({what}), and is not unpickled further: save its tensors as safetensors"
        ) from error
    # A damaged archive surfaces as any of these, depending on where it breaks off.
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is truncated or not a file of weights; download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors by name")
    if wrong := [f"{name} ({type(value).__name__})" for name, value in content.items() if not torch.is_tensor(value)]:
        raise ValueError(f"{path} is not a dictionary of tensors alone: it has {listed(wrong)}")
    # Some programs save parameters, and what is read of one would want a gradient.
    return {name: value.detach() for name, value in content.items()}
