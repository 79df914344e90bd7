"""Hugging Face → Megatron → Hugging Face: nothing changes but what is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_longpo.config import Window
from megatron_longpo.conversion.hf_config import read_hf_model
from megatron_longpo.conversion.hf_export import copy_companions
from megatron_longpo.training.checkpoint_folder import find_checkpoint, saved_config
from tests.conversion.converting import config_of, for_both_generations, to_hf, to_megatron
from tests.conversion.models import MODELS, assert_same_weights, save_random_model, weights_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_is_bit_identical(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = save_random_model(tmp_path / "hf", name, dtype)
    to_megatron(tmp_path / "hf", tmp_path / "megatron")
    to_hf(tmp_path / "megatron", tmp_path / "hf", tmp_path / "back", max_shard_bytes=50_000)
    assert_same_weights(tmp_path / "hf", tmp_path / "back")
    assert config_of(tmp_path / "back") == for_both_generations(config_of(tmp_path / "hf"))
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert loaded.dtype == dtype
    for key, value in model.state_dict().items():
        assert value.equal(loaded.state_dict()[key]), key


def test_bits_that_are_no_numbers_survive(tmp_path: Path) -> None:
    save_random_model(tmp_path / "hf", "qwen3", torch.bfloat16)
    path = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(path)
    every_bit_pattern = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16)
    for value in tensors.values():
        value.view(-1)[:] = every_bit_pattern.repeat(2)[: value.numel()].flip(0)
    save_file(tensors, path, metadata={"format": "pt"})
    to_megatron(tmp_path / "hf", tmp_path / "megatron")
    to_hf(tmp_path / "megatron", tmp_path / "hf", tmp_path / "back")
    assert_same_weights(tmp_path / "hf", tmp_path / "back")


def test_a_pickled_file_may_hold_parameters(tmp_path: Path) -> None:
    """``state_dict`` detaches its tensors, but not every program saves that."""
    model = save_random_model(tmp_path / "hf", "qwen3")
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "model.safetensors")
    torch.save(dict(model.named_parameters()), tmp_path / "hf" / "pytorch_model.bin")
    to_megatron(tmp_path / "hf", tmp_path / "megatron")
    to_hf(tmp_path / "megatron", tmp_path / "hf", tmp_path / "back")
    assert_same_weights(tmp_path, tmp_path / "back")


def test_the_checkpoint_records_the_models_flags(tmp_path: Path) -> None:
    save_random_model(tmp_path / "hf", "llama3.1")
    to_megatron(tmp_path / "hf", tmp_path / "megatron", rotary_base=1e7, max_position_embeddings=131072)
    checkpoint = find_checkpoint(tmp_path / "megatron")
    assert checkpoint == tmp_path / "megatron" / "release"
    saved = saved_config(checkpoint)
    model = read_hf_model(tmp_path / "hf")
    assert saved.model.rotary_base == 1e7
    assert saved.model.max_position_embeddings == 131072
    assert saved.objective.reference_rotary_base == model.rotary_base
    for field in ("num_layers", "vocab_size", "use_rope_scaling", "norm_epsilon"):
        assert getattr(saved.model, field) == getattr(model, field)
    assert "rotary-base: 10000000.0" in (checkpoint / "run.yaml").read_text()


def test_params_dtype(tmp_path: Path) -> None:
    save_random_model(tmp_path / "hf", "mistral-v0.2")
    to_megatron(tmp_path / "hf", tmp_path / "megatron", params_dtype="bf16")
    to_hf(tmp_path / "megatron", tmp_path / "hf", tmp_path / "back")
    before, after = weights_of(tmp_path / "hf"), weights_of(tmp_path / "back")
    assert all(after[name].equal(value.bfloat16()) for name, value in before.items())
    assert config_of(tmp_path / "back") == for_both_generations(config_of(tmp_path / "hf")) | {"dtype": "bfloat16"}


def test_mixed_types_need_params_dtype(llama: Path, tmp_path: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"mixes tensors of bfloat16, float32: choose with --params-dtype"):
        to_megatron(llama, tmp_path / "megatron")
    assert not (tmp_path / "megatron").exists()
    to_megatron(llama, tmp_path / "megatron", params_dtype="fp32")


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 512}
YARN = {"rope_type": "yarn", "factor": 2.0, "attention_factor": None}
GENERATIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # What the template's config.json says about RoPE, and what the export's must say for base 1e7 and 8192 positions.
    "4, plain": ({"rope_theta": 1e4}, {"rope_theta": 1e7}),
    "4, left out": ({}, {"rope_theta": 1e7}),
    "4, llama3": (
        {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"type": "llama3"}},
        {"rope_theta": 1e7, "rope_scaling": LLAMA3 | {"type": "llama3"}},
    ),
    # Beside what transformers 5 wrote stands what transformers 4 reads, which else takes 1e4 and no scaling.
    "5, plain": (
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 1e7, "rope_type": "default"}, "rope_theta": 1e7},
    ),
    "5, yarn": (
        {"rope_parameters": YARN | {"rope_theta": 1e4, "original_max_position_embeddings": 2048}},
        {
            "rope_parameters": YARN | {"rope_theta": 1e7, "original_max_position_embeddings": 2048},
            "rope_theta": 1e7,
            "rope_scaling": YARN | {"original_max_position_embeddings": 2048},
        },
    ),
    # The original length was the model's own, 4096, which changes.
    "5, yarn without original length": (
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn", "factor": 2.0}},
        {
            "rope_parameters": {
                "rope_theta": 1e7,
                "rope_type": "yarn",
                "factor": 2.0,
                "original_max_position_embeddings": 4096,
            },
            "rope_theta": 1e7,
            "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4096},
        },
    ),
    # Some programs write both (marin-community/marin#7801).
    "both, plain": (
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}, "rope_theta": 1e4},
        {"rope_parameters": {"rope_theta": 1e7, "rope_type": "default"}, "rope_theta": 1e7},
    ),
    "both, llama3": (
        {
            "rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 5e5},
            "rope_theta": 5e5,
            "rope_scaling": LLAMA3 | {"rope_type": "llama3"},
        },
        {
            "rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 1e7},
            "rope_theta": 1e7,
            "rope_scaling": LLAMA3 | {"rope_type": "llama3"},
        },
    ),
}


@pytest.mark.parametrize("generation", GENERATIONS)
def test_only_changed_fields_change_in_both_generations(generation: str, llama: Path, tmp_path: Path) -> None:
    before, after = GENERATIONS[generation]
    config = {
        k: v for k, v in config_of(llama).items() if k not in ("rope_parameters", "dtype", "transformers_version")
    }
    version, dtype = ("4.40.0", "torch_dtype") if generation.startswith("4") else ("5.0.0", "dtype")
    config |= {"transformers_version": version, dtype: "bfloat16", "own_field": [1, 2]}
    (llama / "config.json").write_text(json.dumps(config | before))
    to_megatron(llama, tmp_path / "megatron", rotary_base=1e7, max_position_embeddings=8192)
    to_hf(tmp_path / "megatron", llama, tmp_path / "back")
    assert config_of(tmp_path / "back") == config | after | {"max_position_embeddings": 8192}
    assert read_hf_model(tmp_path / "back") == saved_config(find_checkpoint(tmp_path / "megatron")).model


def test_a_window_stays_unless_it_is_dropped(tmp_path: Path) -> None:
    hf = tmp_path / "hf"
    save_random_model(hf, "mistral-v0.1")

    def exported(**options: Any) -> dict[str, Any]:
        to_megatron(hf, tmp_path / "megatron", overwrite=True, **options)
        to_hf(tmp_path / "megatron", hf, tmp_path / "back", overwrite=True)
        assert read_hf_model(tmp_path / "back") == saved_config(find_checkpoint(tmp_path / "megatron")).model
        return config_of(tmp_path / "back")

    before = for_both_generations(config_of(hf))
    assert exported() == before
    # A longer model keeps the window that it was made with.
    assert exported(max_position_embeddings=8192) == before | {"max_position_embeddings": 8192}
    assert exported(window_size=Window()) == before | {"sliding_window": None}
    assert exported(window_size=Window(4095, 0)) == before | {"sliding_window": 4096}
    saved = saved_config(find_checkpoint(tmp_path / "megatron"))
    assert saved.model.window_size == Window(4095, 0)
    # The reference model is the one before training, with its own window.
    assert saved.objective.reference_window_size == Window(15, 0)
    # transformers believes layer_types, where it is, before sliding_window.
    layers = {"layer_types": ["sliding_attention"] * 4}
    (hf / "config.json").write_text(json.dumps(before | layers))
    assert exported() == before | layers
    assert exported(window_size=Window()) == before | {"sliding_window": None}


def test_a_window_that_the_architecture_cannot_say_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--window-size 15,0: LlamaForCausalLM has no window .*MistralForCausalLM"):
        to_megatron(llama, tmp_path / "megatron", window_size=Window(15, 0))
    # Mistral's tensors are Llama's, so a Llama template reads a Mistral checkpoint; but not its window.
    save_random_model(tmp_path / "mistral", "mistral-v0.1", num_key_value_heads=4, rms_norm_eps=1e-5)
    to_megatron(tmp_path / "mistral", tmp_path / "megatron")
    with pytest.raises(ValueError, match=r"--window-size 15,0: LlamaForCausalLM has no window"):
        to_hf(tmp_path / "megatron", llama, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_companions_are_copied_and_nothing_else(llama: Path, tmp_path: Path) -> None:
    companions = ["tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja", "LICENSE.txt"]
    companions += ["generation_config.json", "special_tokens_map.json", "merges.txt", "vocab.json"]
    for name in companions:
        (llama / name).write_text(f"content of {name}")
    (llama / "additional_chat_templates").mkdir()
    (llama / "additional_chat_templates" / "tools.jinja").write_text("tools")
    for name in ("README.md", "training_args.bin", "modeling_own.py"):
        (llama / name).write_text("not for export")
    to_megatron(llama, tmp_path / "megatron")
    to_hf(tmp_path / "megatron", llama, tmp_path / "back")
    found = {path.name for path in (tmp_path / "back").iterdir()}
    assert found == {*companions, "additional_chat_templates", "config.json", "model.safetensors"}
    assert (tmp_path / "back" / "tokenizer.json").read_text() == "content of tokenizer.json"
    assert (tmp_path / "back" / "additional_chat_templates" / "tools.jinja").read_text() == "tools"


def test_companions_of_the_folder_itself_stay(tmp_path: Path) -> None:
    for name in ("template", "export"):
        (tmp_path / name / "additional_chat_templates").mkdir(parents=True)
        for file in ("chat_template.jinja", f"additional_chat_templates/{name}.jinja"):
            (tmp_path / name / file).write_text(f"of the {name}")
    copy_companions(tmp_path / "template", tmp_path / "export")
    assert (tmp_path / "export" / "chat_template.jinja").read_text() == "of the export"
    assert [path.name for path in (tmp_path / "export" / "additional_chat_templates").iterdir()] == ["export.jinja"]


def test_a_template_of_another_model_is_refused(llama: Path, tmp_path: Path) -> None:
    to_megatron(llama, tmp_path / "megatron")
    save_random_model(tmp_path / "other", "llama2", intermediate_size=64)
    with pytest.raises(ValueError, match=r"no template for .*ffn_hidden_size is 64 there and 80 in the checkpoint"):
        to_hf(tmp_path / "megatron", tmp_path / "other", tmp_path / "back")
    assert not (tmp_path / "back").exists()
