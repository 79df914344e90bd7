"""RoPE in exported config.json files: every form that a reader may take it from says what was trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_longpo.config import ModelConfig
from megatron_longpo.conversion.hf_config import read_hf_folder, read_hf_model
from megatron_longpo.conversion.hf_export import exported_config, restore_rope
from tests.conversion.converting import config_of
from tests.conversion.models import save_random_model
from tests.conversion.test_hf_config import LLAMA3_SCALING, LLAMA31_8B

BASE = {"rope_theta": 5e5}
PLAIN = {"rope_type": "default"}
YARN_SCALING = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
TEMPLATES: dict[str, dict[str, Any]] = {
    "4, plain": BASE,
    "4, llama3": BASE | {"rope_scaling": LLAMA3_SCALING},
    "4, yarn": BASE | {"rope_scaling": YARN_SCALING},
    "5, left out": {"transformers_version": "5.0.0"},
    "5, plain": {"rope_parameters": PLAIN | BASE},
    "5, llama3": {"rope_parameters": LLAMA3_SCALING | BASE},
    "5, yarn": {"rope_parameters": YARN_SCALING | BASE},
    "both, plain": BASE | {"rope_parameters": PLAIN | BASE, "rope_scaling": None},
    "both, llama3": BASE | {"rope_parameters": LLAMA3_SCALING | BASE, "rope_scaling": LLAMA3_SCALING},
    "both, base within": {"rope_parameters": LLAMA3_SCALING | BASE, "rope_scaling": LLAMA3_SCALING | BASE},
    # transformers 5 takes the first of them.
    "both, contradictory": {"rope_scaling": LLAMA3_SCALING | BASE, "rope_parameters": PLAIN | {"rope_theta": 1e4}},
}
TRAINED: dict[str, dict[str, Any]] = {
    "as it was": {},
    "another base": {"rotary_base": 1e7},
    "longer": {"max_position_embeddings": 524288},
    "no scaling": {"rotary_base": 1e7, "use_rope_scaling": False, "position_embedding_type": "rope"},
    "llama3": {"use_rope_scaling": True, "rope_scaling_factor": 32.0, "position_embedding_type": "rope"},
    "yarn": {"use_rope_scaling": False, "position_embedding_type": "yarn", "yarn_rotary_scaling_factor": 8.0},
}


def written(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def rope_of(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What a reader takes from a config.json: base, scaling, YaRN and the length."""
    model = read_hf_model(written(folder, config))
    names = ["rotary_base", "position_embedding_type", "use_rope_scaling", "max_position_embeddings"]
    if model.use_rope_scaling:
        names += [name for name in vars(model) if name.startswith("rope_")]
    if model.position_embedding_type == "yarn":
        names += [name for name in vars(model) if name.startswith("yarn_")]
    return {name: getattr(model, name) for name in names}


def assert_every_form_says(folder: Path, config: dict[str, Any], model: ModelConfig) -> None:
    """The whole file, what transformers 4 knows of it, and what transformers 5 wrote."""
    older = {name: value for name, value in config.items() if name != "rope_parameters"}
    forms = [config, older]
    if "rope_parameters" in config:
        forms.append({name: value for name, value in config.items() if name not in ("rope_theta", "rope_scaling")})
    for form in forms:
        found = rope_of(folder, form)
        assert found == {name: getattr(model, name) for name in found}, form


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("template", TEMPLATES)
def test_every_form_says_what_was_trained(template: str, trained: str, tmp_path: Path) -> None:
    stored = LLAMA31_8B | TEMPLATES[template]
    read = read_hf_folder(written(tmp_path, stored))
    model = replace(read.model, **TRAINED[trained])
    config = exported_config(read, model, torch.bfloat16)
    assert ("rope_parameters" in config) == (not template.startswith("4"))
    if not template.startswith("4") or "rope_theta" in stored:
        assert config["rope_theta"] == model.rotary_base
    assert_every_form_says(tmp_path, config, model)
    if template.startswith("4") and trained == "as it was":
        assert config == stored | {"torch_dtype": "bfloat16"}


def test_the_type_is_the_same_under_both_names(tmp_path: Path) -> None:
    stored = LLAMA31_8B | BASE | {"dtype": "float32", "torch_dtype": "float32"}
    read = read_hf_folder(written(tmp_path, stored))
    assert exported_config(read, read.model, torch.bfloat16) == stored | dict.fromkeys(
        ("dtype", "torch_dtype"), "bfloat16"
    )


def test_a_rope_that_transformers_would_read_otherwise_is_refused(tmp_path: Path) -> None:
    read = read_hf_folder(written(tmp_path, LLAMA31_8B | BASE | {"rope_scaling": YARN_SCALING}))
    same = replace(read.model, yarn_mscale=1.0, yarn_mscale_all_dim=0.0)
    exported_config(read, same, torch.bfloat16)  # transformers drops both, and the temperature is the same without
    other = replace(read.model, yarn_mscale=0.5, yarn_mscale_all_dim=0.0)
    with pytest.raises(
        ValueError,
        match=r"would read mscale None instead of the checkpoint's 0\.5, mscale_all_dim None instead of .* 0\.0 from "
        r"the exported config\.json.*remove what contradicts it from the config\.json of --hf-model",
    ):
        exported_config(read, other, torch.bfloat16)


@pytest.mark.parametrize("name", ["qwen2.5", "llama3.1", "qwen2.5-yarn-tied"])
def test_what_another_program_saved_is_completed(name: str, tmp_path: Path) -> None:
    """Quantisers save with transformers 5, and put a field of their own into config.json."""
    save_random_model(tmp_path, name)
    model = read_hf_model(tmp_path)
    quantised = config_of(tmp_path) | {"quantization_config": {"quant_algo": "FP8"}}
    restore_rope(written(tmp_path, quantised), model)
    config = config_of(tmp_path)
    assert config["rope_theta"] == model.rotary_base
    assert config.pop("quantization_config") == {"quant_algo": "FP8"}
    assert_every_form_says(tmp_path, config, model)
