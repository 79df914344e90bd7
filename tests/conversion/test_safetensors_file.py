"""Sharded safetensors files, written tensor by tensor."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_longpo.conversion.safetensors_file import ShardedWriter, TensorSpec


def _specs(tensors: dict[str, torch.Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, tuple(value.shape), value.dtype) for name, value in tensors.items()]


def _write(folder: Path, tensors: dict[str, torch.Tensor], max_shard_bytes: int) -> ShardedWriter:
    with ShardedWriter(folder, _specs(tensors), max_shard_bytes) as writer:
        for name, value in tensors.items():
            writer.write(name, value)
    return writer


TENSORS = {
    "z": torch.randn(3, 5),
    "half": torch.randn(7).bfloat16(),
    "a": torch.randn(4, 6).T,
    "large": torch.randn(100),
    "other": torch.randn(3).half(),
}


def test_one_file(tmp_path: Path) -> None:
    writer = _write(tmp_path, TENSORS, 10**6)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    loaded = load_file(tmp_path / "model.safetensors")
    del writer  # nothing had to wait for its end
    assert loaded.keys() == TENSORS.keys()
    assert all(loaded[name].equal(value) and loaded[name].dtype == value.dtype for name, value in TENSORS.items())
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    header_bytes = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    assert header_bytes % 8 == 0, "mapped values would lie at odd addresses"


def test_shards_and_index(tmp_path: Path) -> None:
    _write(tmp_path, TENSORS, 74)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    # z and half fill a file; a and large alone, beyond the limit; other.
    assert files == [f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5)]
    assert {name: files.index(place) for name, place in index["weight_map"].items()} == {
        "z": 0,
        "half": 0,
        "a": 1,
        "large": 2,
        "other": 3,
    }
    total = sum(value.nbytes for value in TENSORS.values())
    assert index["metadata"] == {"total_parameters": 149, "total_size": total}
    for name, place in index["weight_map"].items():
        assert load_file(tmp_path / place)[name].equal(TENSORS[name])


def test_a_shard_without_room_is_an_error_though_the_last_one_fits(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            _write(tmp_path, {"large": torch.zeros(500), "small": torch.zeros(3)}, 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_tensors_come_as_announced(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="other"), ShardedWriter(tmp_path, _specs(TENSORS), 150) as writer:
        writer.write("other", TENSORS["other"])
    with pytest.raises(AssertionError, match="5 announced tensors were not written"):
        ShardedWriter(tmp_path, _specs(TENSORS), 150).__enter__().__exit__(None, None, None)
