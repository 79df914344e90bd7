"""The export example: a model is quantised on the CPU, its state saved and restored (needs nvidia-modelopt)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from examples.export import quantize
from megatron_longpo.conversion.to_hf import convert_to_hf
from megatron_longpo.conversion.to_megatron import convert_to_megatron
from tests.conversion.models import save_random_model
from tests.tiny import VOCAB, write_tiny_dataset

pytest.importorskip("modelopt")


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    return str(write_tiny_dataset(tmp_path / "pairs"))


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    save_random_model(tmp_path / "hf", "qwen3", torch.bfloat16, vocab_size=VOCAB)
    (tmp_path / "hf" / "chat_template.jinja").write_text("{{ messages }}")
    convert_to_megatron(tmp_path / "hf", tmp_path / "megatron", show_progress=False)
    convert_to_hf(tmp_path / "megatron", tmp_path / "hf", tmp_path / "exported", show_progress=False)
    return tmp_path / "exported"


def test_calibration_rows_are_training_conversations(dataset: str) -> None:
    from megatron_longpo.data.dataset import PreferenceDataset

    rows = quantize.calibration_rows(dataset, 5, 10_000, VOCAB)
    assert len(rows) == 5
    documents = [PreferenceDataset(dataset)[number] for number in range(12)]
    long = [[*d.document_tokens.tolist(), *d.joint[0].tokens.tolist()] for d in documents]
    assert all(row[0].tolist() in long for row in rows)
    cut = quantize.calibration_rows(dataset, 5, 20, VOCAB)
    for row, whole in zip(cut, rows, strict=True):
        assert row.shape == (1, 20)
        assert row[0, :10].equal(whole[0, :10]) and row[0, 10:].equal(whole[0, -10:])


@pytest.mark.parametrize("recipe", ["fp8", "int8"])
def test_quantised_state_is_saved_and_restored(recipe: str, exported: Path, dataset: str, tmp_path: Path) -> None:
    import modelopt.torch.opt as mto

    rows = quantize.calibration_rows(dataset, 4, 64, VOCAB)
    original = AutoModelForCausalLM.from_pretrained(exported).eval()
    model = quantize.quantize(AutoModelForCausalLM.from_pretrained(exported).eval(), recipe, rows)
    mto.save(model, tmp_path / "state.pt")
    restored = mto.restore(AutoModelForCausalLM.from_pretrained(exported).eval(), tmp_path / "state.pt")
    with torch.no_grad():
        exact, rounded, again = (each(rows[0]).logits.float() for each in (original, model, restored))
    assert again.equal(rounded)
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.2


def test_fp8_folder_for_inference_engines(exported: Path, dataset: str, tmp_path: Path) -> None:
    save = tmp_path / "fp8"
    words = ["--hf-model", str(exported), "--data-path", dataset, "--recipe", "fp8", "--save", str(save)]
    quantize.main([*words, "--num-samples", "4", "--max-tokens", "64"])
    config = json.loads((save / "config.json").read_text())
    assert config["quantization_config"]["quant_algo"] == "FP8"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"], "what an engine on transformers 4 reads"
    assert (save / "chat_template.jinja").read_text() == "{{ messages }}"
    tensors = load_file(save / "model.safetensors")
    original = load_file(exported / "model.safetensors")
    weight = "model.layers.1.mlp.down_proj.weight"
    assert tensors[weight].dtype == torch.float8_e4m3fn
    scaled = tensors[weight].float() * tensors[f"{weight}_scale"]
    assert (scaled - original[weight].float()).norm() / original[weight].float().norm() < 0.05
    assert tensors["lm_head.weight"].equal(original["lm_head.weight"])
    with pytest.raises(SystemExit, match="--overwrite"):
        quantize.main(words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can")
def test_nvfp4_without_a_gpu_is_refused(exported: Path, dataset: str, tmp_path: Path) -> None:
    words = ["--hf-model", str(exported), "--data-path", dataset, "--recipe", "nvfp4", "--save", str(tmp_path / "x")]
    with pytest.raises(SystemExit, match="--recipe nvfp4 needs a GPU"):
        quantize.main(words)
    assert not (tmp_path / "x").exists()
