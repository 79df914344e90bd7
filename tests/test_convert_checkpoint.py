"""The command line of tools/convert_checkpoint.py, and what `verify` finds."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_longpo.conversion.verify import parse_sizes
from megatron_longpo.convert_checkpoint import main, parse_size
from tests.conversion.models import assert_same_weights, save_random_model


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 GiB", 3 << 29), ("20kb", 20_000), ("7B", 7), ("2TB", 2 * 10**12)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["5", "GB", "-5GB", "5 gigabytes", "0GB", ""])
def test_wrong_sizes(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="must be a size such as 5GB"):
        parse_size(text)


def test_parallel_sizes() -> None:
    assert parse_sizes("tp=2,pp=3") == (2, 3)
    assert parse_sizes("pp=2") == (1, 2)
    for wrong in ("", "2", "tp=0", "dp=2", "tp=two", "tp=2;pp=2"):
        with pytest.raises(ValueError, match=r"expected sizes such as tp=2"):
            parse_sizes(wrong)


def test_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf, megatron, back = (str(tmp_path / name) for name in ("hf", "megatron", "back"))
    save_random_model(tmp_path / "hf", "qwen2.5")
    assert main(["hf-to-megatron", "--hf-model", hf, "--save", megatron, "--rotary-base", "1e7"]) == 0
    printed = capsys.readouterr().out
    assert "--num-layers 4 --hidden-size 48" in printed and "--rotary-base 10000000.0" in printed.replace(
        "1e+07", "10000000.0"
    )
    assert (
        main(["megatron-to-hf", "--load", megatron, "--hf-model", hf, "--save", back, "--max-shard-size", "90KB"]) == 0
    )
    assert_same_weights(tmp_path / "hf", tmp_path / "back")
    wrote, missing = capsys.readouterr().out.splitlines()
    assert "release" in wrote and missing.startswith(f"{back} has no tokenizer, as --hf-model {hf} has none: copy ")
    (tmp_path / "back" / "tokenizer.json").write_text("{}")
    assert main(["megatron-to-hf", "--load", megatron, "--hf-model", hf, "--save", back, "--overwrite"]) == 0
    assert "no tokenizer" not in capsys.readouterr().out, "what is there stays"

    # A folder that is not empty: exit code 2, the flag named, one line.
    assert main(["hf-to-megatron", "--hf-model", hf, "--save", megatron]) == 2
    error = capsys.readouterr().err
    assert "convert_checkpoint.py: error: --save" in error and "--overwrite" in error


def test_verify_finds_a_single_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf, megatron = str(tmp_path / "hf"), str(tmp_path / "megatron")
    save_random_model(tmp_path / "hf", "qwen3", torch.bfloat16)
    main(["hf-to-megatron", "--hf-model", hf, "--save", megatron])
    capsys.readouterr()
    assert main(["verify", "--hf-model", hf, "--megatron", megatron, "--torchrun"]) == 0
    equal = capsys.readouterr().out
    assert "model.layers.*.self_attn.k_norm.weight" in equal and equal.endswith("\nequal\n")
    assert max(map(len, equal.splitlines())) <= 80

    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["model.layers.2.self_attn.v_proj.weight"].view(torch.int16)[3, 4] ^= 1
    save_file(tensors, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    assert main(["verify", "--hf-model", hf, "--megatron", megatron, "--torchrun"]) == 1
    table = capsys.readouterr().out.splitlines()
    (row,) = (line.split() for line in table if "v_proj" in line)
    assert row[1] == "4" and row[-2] == "1" and 0 < float(row[-1]) < 0.1
    (row,) = (line.split() for line in table if "q_proj" in line)
    assert row[-2:] == ["0", "0"]
    assert table[-1] == "DIFFERENT"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama3.1", "mistral-v0.1"])
def test_verify_compares_logits_of_a_split_model(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf, megatron = str(tmp_path / "hf"), str(tmp_path / "megatron")
    save_random_model(tmp_path / "hf", name, torch.bfloat16)
    # The checkpoint's own RoPE counts on both sides.
    main(["hf-to-megatron", "--hf-model", hf, "--save", megatron, "--rotary-base", "1e6"])
    capsys.readouterr()
    assert main(["verify", "--hf-model", hf, "--megatron", megatron, "--torchrun", "tp=2"]) == 0
    (row,) = (line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("tp=2"))
    assert float(row[2]) < 1e-4 and float(row[4]) > 1 and row[-1] == "100.0%"
    assert row[1] == ("80" if name == "mistral-v0.1" else "64"), "more tokens than the window holds"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("hf-to-megatron --rotary-base 1", "--rotary-base: '1' must be a number greater than 1"),
        ("hf-to-megatron --rotary-base inf", "--rotary-base: 'inf' must be a number greater than 1"),
        ("hf-to-megatron --rotary-base base", "--rotary-base: 'base' must be a number greater than 1"),
        ("megatron-to-hf --iteration -1", "--iteration: '-1' must be a number greater than -1"),
        ("megatron-to-hf --iteration 1.5", "--iteration: '1.5' must be a number greater than -1"),
    ],
)
def test_numbers_that_cannot_be(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(words.split())
    assert message in capsys.readouterr().err


def test_verify_refuses_sizes_that_the_model_cannot_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_random_model(tmp_path / "hf", "llama3.1")
    words = ["verify", "--hf-model", str(tmp_path / "hf"), "--megatron", str(tmp_path / "none"), "--torchrun"]
    capsys.readouterr()
    for sizes, said in (
        ("tp=3", "tp=3 must divide the model's 4 attention heads"),
        ("tp=4", "tp=4 must divide the model's 2 key/value heads"),
        ("pp=3", "pp=3 must divide the model's 4 layers"),
    ):
        assert main([*words, "tp=1", sizes]) == 2
        assert capsys.readouterr().err == f"convert_checkpoint.py: error: --torchrun {sizes}: {said}\n"
    assert main([*words, "--max-logit-difference", "1e-3"]) == 2
    assert "--max-logit-difference 0.001 has no effect where --torchrun has no" in capsys.readouterr().err
