"""Reading and writing single tensors of a torch_dist checkpoint."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch

from megatron_longpo.conversion import torch_dist_writer
from megatron_longpo.conversion.torch_dist import Place
from megatron_longpo.conversion.torch_dist_reader import TensorReader
from megatron_longpo.conversion.torch_dist_writer import LazyTensor, write_tensors


def _write(folder: Path, values: dict[Place, torch.Tensor]) -> list[int]:
    sizes: list[int] = []
    tensors = [
        LazyTensor(place, tuple(value.shape), value.dtype, lambda out, value=value: out.copy_(value))
        for place, value in values.items()
    ]
    write_tensors(folder, tensors, ["a._extra_state/shard_0_1"], sizes.append)
    return sizes


def test_what_is_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_dist_writer, "FILE_BYTES", 500)  # several files
    values = {Place("stack", layer, 3): torch.randn(5, 7) for layer in range(3)}
    values |= {Place("stack.bias", layer, 3): torch.randn(7) for layer in range(3)}
    values |= {Place("norm"): torch.randn(6).bfloat16(), Place("embedding"): torch.randn(9, 4)}
    sizes = _write(tmp_path, values)
    assert sizes == [value.nbytes for value in values.values()]
    assert len(list(tmp_path.glob("*.distcp"))) > 1
    reader = TensorReader(tmp_path)
    assert reader.missing_files() == []
    for place, value in values.items():
        read = reader.read(place, tuple(value.shape))
        assert read.dtype == value.dtype and read.equal(value), place
    assert reader.tensors["stack"].size == (3, 5, 7)
    # The first rows of a longer tensor: an embedding without its padding.
    assert reader.read(Place("embedding"), (5, 4)).equal(values[Place("embedding")][:5])


def test_whole_tensors_are_read_straight_into_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {Place("stack", layer, 2): torch.randn(5, 7) for layer in range(2)} | {
        Place("norm"): torch.randn(6).half()
    }
    _write(tmp_path, values)
    reader = TensorReader(tmp_path)
    by_torch = []
    read_data = reader._reader.read_data
    monkeypatch.setattr(reader._reader, "read_data", lambda *args: by_torch.append(args) or read_data(*args))
    assert all(reader.read(place, tuple(value.shape)).equal(value) for place, value in values.items())
    assert not by_torch
    assert reader.read(Place("norm"), (3,)).equal(values[Place("norm")][:3])
    assert len(by_torch) == 1, "a part of a stored tensor"


def test_tensors_are_stored_without_the_memory_that_they_share(tmp_path: Path) -> None:
    large, small = torch.randn(100, 100), torch.randn(2, 100)
    _write(tmp_path, {Place("large"): large, Place("small"): small, Place("transposed"): large.T})
    assert sum(path.stat().st_size for path in tmp_path.glob("*.distcp")) < 2 * large.nbytes + small.nbytes + 10_000
    reader = TensorReader(tmp_path)
    assert reader.read(Place("small"), (2, 100)).equal(small)
    assert reader.read(Place("transposed"), (100, 100)).equal(large.T)


class _Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("true",)


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(_Harmful()),
        b"csubprocess\nPopen\n.",
        b"ctorch\nload\n.",
        b"ctorch.distributed.checkpoint.filesystem\nPath\n.",  # which that module merely imports
    ],
)
def test_metadata_is_not_unpickled_beyond_its_own_classes(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match=r"is no part of checkpoint metadata"):
        TensorReader(tmp_path)


def test_dotted_names_reach_no_imported_module(tmp_path: Path) -> None:
    # Protocol 4 lets a pickle walk attributes: torch.distributed.checkpoint.filesystem.os.system
    code = b"\x80\x04\x8c'torch.distributed.checkpoint.filesystem\x8c\tos.system\x93\x8c\x04true\x85R."
    (tmp_path / ".metadata").write_bytes(code)
    with pytest.raises(ValueError, match=r"os.system is no part of checkpoint metadata"):
        TensorReader(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"\x80", b"\x80\x04\x8c\x01\xff.", b"\x80\x04](K\x01K\x02R.", b"\x80\x04}]K\x01s."]
)
def test_damaged_metadata_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match=r"\.metadata is damaged or not checkpoint metadata: "):
        TensorReader(tmp_path)


def test_other_pickles_are_no_metadata(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match=r"holds a dict, not checkpoint metadata"):
        TensorReader(tmp_path)
