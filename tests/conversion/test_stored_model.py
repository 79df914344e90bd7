"""Megatron checkpoints to convert: which one is taken, and damage that is found."""

from __future__ import annotations

import io
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from tests.conversion.converting import to_hf, to_megatron
from tests.conversion.models import save_random_model


def test_iterations(llama: Path, tmp_path: Path) -> None:
    to_megatron(llama, tmp_path / "run")
    (tmp_path / "run" / "release").rename(tmp_path / "run" / "iter_0000020")
    shutil.copytree(tmp_path / "run" / "iter_0000020", tmp_path / "run" / "iter_0000010")
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("20")
    assert to_hf(tmp_path / "run", llama, tmp_path / "newest").name == "iter_0000020"
    assert to_hf(tmp_path / "run", llama, tmp_path / "chosen", iteration=10).name == "iter_0000010"
    with pytest.raises(ValueError, match=r"--iteration 15: .* is no checkpoint; there are \[10, 20\]"):
        to_hf(tmp_path / "run", llama, tmp_path / "none", iteration=15)
    with pytest.raises(ValueError, match=r"^/.*llama holds no checkpoint: .*; give the folder that a run's or"):
        to_hf(llama, llama, tmp_path / "none")


def test_a_template_of_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    save_random_model(tmp_path / "qwen2.5", "qwen2.5")
    save_random_model(tmp_path / "qwen3", "qwen3")
    to_megatron(tmp_path / "qwen2.5", tmp_path / "megatron")
    with pytest.raises(
        ValueError,
        match=r"Qwen3ForCausalLM has parameters that are missing: \S*q_layernorm.weight, .*; "
        r"Qwen3ForCausalLM has no place for the parameters: .*linear_qkv.bias; give as --hf-model a folder of",
    ):
        to_hf(tmp_path / "megatron", tmp_path / "qwen3", tmp_path / "back")


def test_tensors_of_other_shapes_and_types_are_refused(llama: Path, tmp_path: Path) -> None:
    to_megatron(llama, tmp_path / "megatron")
    release = tmp_path / "megatron" / "release"
    metadata = pickle.loads((release / ".metadata").read_bytes())
    metadata.state_dict_metadata["decoder.final_layernorm.weight"].properties.dtype = torch.float32
    (release / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"release has parameters of torch.bfloat16, torch.float32; expected one of"):
        to_hf(tmp_path / "megatron", llama, tmp_path / "back")
    common = torch.load(release / "common.pt", weights_only=False)
    common["args"].ffn_hidden_size += 16
    torch.save(common, release / "common.pt")
    with pytest.raises(ValueError, match=r"shapes disagree with the recorded flags: \S*linear_fc1.weight is \[4, 160"):
        to_hf(tmp_path / "megatron", llama, tmp_path / "back")


def test_a_damaged_checkpoint_is_refused(llama: Path, tmp_path: Path) -> None:
    to_megatron(llama, tmp_path / "megatron")
    release = tmp_path / "megatron" / "release"
    weights = release / "__0_0.distcp"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"files are missing or truncated: __0_0.distcp"):
        to_hf(tmp_path / "megatron", llama, tmp_path / "back")
    weights.write_bytes(content)
    metadata = (release / ".metadata").read_bytes()
    (release / ".metadata").write_bytes(metadata[:-10])
    with pytest.raises(ValueError, match=r"\.metadata is damaged"):
        to_hf(tmp_path / "megatron", llama, tmp_path / "back")
    (release / ".metadata").unlink()
    with pytest.raises(ValueError, match=r"\.metadata is missing"):
        to_hf(tmp_path / "megatron", llama, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def _pickled(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "release/common.pt",
            None,
            r"release cannot be loaded: common\.pt: it is missing\. If it is damaged, write the it",
        ),
        ("release/common.pt", b"", r"release cannot be loaded: common\.pt: EOFError"),
        ("release/common.pt", b"PK\x03\x04 half", r"release cannot be loaded: common\.pt: PytorchStreamReader failed"),
        ("release/common.pt", _pickled({}), r"release does not record its model's shape, as those of this trainer and"),
        ("release/common.pt", b"\xff\xfe", r"release cannot be loaded: common\.pt: \w"),
        ("release/metadata.json", b"", r"release cannot be loaded: metadata\.json: Expecting value"),
        ("release/metadata.json", b"\xff", r"release cannot be loaded: metadata\.json: 'utf-8' codec"),
        (
            "release/metadata.json",
            b'{"x": 1}',
            r"release cannot be loaded: metadata\.json: .*(unexpected keyword|missing)",
        ),
        ("latest_checkpointed_iteration.txt", b"\xff", r"iteration\.txt: expected an iteration number or 'release'"),
        (
            "latest_checkpointed_iteration.txt",
            "²".encode(),
            r"iteration\.txt: expected an iteration number or 'release'",
        ),
    ],
)
def test_what_is_damaged_is_named(llama: Path, tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    to_megatron(llama, tmp_path / "megatron")
    (tmp_path / "megatron" / name).unlink()
    if content is not None:
        (tmp_path / "megatron" / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        to_hf(tmp_path / "megatron", llama, tmp_path / "back")
