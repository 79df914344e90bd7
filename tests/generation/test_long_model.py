"""The second folder of a model, opened as transformers and vLLM open it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from megatron_longpo.generation.long_model import long_config, main

SHAPE = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 4096}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 2.0}
LENGTH = {"original_max_position_embeddings": 1024}

CONFIGS: dict[str, dict[str, Any]] = {
    "transformers 4": {"rope_theta": 1e6, "rope_scaling": None},
    "transformers 4, without a base": {},
    "transformers 4, llama3": {"rope_theta": 5e5, "rope_scaling": LLAMA3 | LENGTH},
    "transformers 4, yarn": {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 2.0}},
    "transformers 5": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "transformers 5, llama3": {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
    "transformers 5, yarn": {"rope_parameters": YARN | LENGTH | {"rope_theta": 1e6}},
    "transformers 5, base on top": {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 1e6},
    "transformers 5, empty": {"rope_parameters": None, "transformers_version": "5.0.0"},
}


def opened(folder: Path) -> Any:
    """The configuration as vLLM has it: by transformers, and then once more by transformers' standard."""
    config = AutoConfig.from_pretrained(folder)
    config.standardize_rope_params()
    return config


@pytest.mark.parametrize("name", CONFIGS)
def test_length_and_base_change_and_nothing_else(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, save = tmp_path / "model", tmp_path / "new" / "long"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(SHAPE | CONFIGS[name]))
    main(["--hf-model", str(model), "--save", str(save), "--max-position-embeddings", "8192", "--rotary-base", "1e7"])
    assert capsys.readouterr().out == f"wrote {save}\n"
    old, new = opened(model), opened(save)
    assert new.max_position_embeddings == 8192
    assert new.rope_parameters == old.rope_parameters | {"rope_theta": 1e7}
    changed = {name for name, value in new.to_dict().items() if old.to_dict()[name] != value}
    assert changed - {"_name_or_path"} == {"max_position_embeddings", "rope_parameters"}


def test_what_is_kept() -> None:
    for config in CONFIGS.values():
        assert long_config(SHAPE | config, 4000) == SHAPE | config, "it has room already"
    assert long_config(SHAPE | {"rope_theta": 1e6}, 8192)["rope_theta"] == 1e6
    derived = {"rope_type": "yarn", "factor": None} | LENGTH
    assert long_config(SHAPE | {"rope_scaling": derived}, 8192)["rope_scaling"]["factor"] == 4.0


def test_the_rest_of_the_folder_is_linked(tmp_path: Path) -> None:
    model, save = tmp_path / "model", tmp_path / "long"
    (model / "additional_chat_templates").mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(SHAPE))
    for name in ("model.safetensors", "tokenizer.json", "params.json", "consolidated-00001-of-00002.safetensors"):
        (model / name).write_text(name)
    main(["--hf-model", str(model), "--save", str(save), "--max-position-embeddings", "8192"])
    # vLLM would take Mistral's own form of the model from the other two, with its length and base.
    linked = {"additional_chat_templates", "model.safetensors", "tokenizer.json"}
    assert {path.name for path in save.iterdir()} == linked | {"config.json"}
    assert all((save / name).resolve() == (model / name).resolve() for name in linked)
    assert json.loads((model / "config.json").read_text()) == SHAPE


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"text_config": SHAPE},
            "config.json: it has no max_position_embeddings, or has it in a part of its own; copy",
        ),
        (
            SHAPE | {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
            "its layers differ in RoPE's parameters",
        ),
        (
            SHAPE | {"rope_scaling": {"type": "longrope"}},
            "RoPE of the kind 'longrope' is not known here, only default,",
        ),
        (None, "model is no folder of a Hugging Face model: config.json: "),
    ],
)
def test_models_that_it_does_not_know(config: dict[str, Any] | None, message: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    if config is not None:
        (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    words = ["--hf-model", str(tmp_path / "model"), "--save", str(tmp_path / "long"), "--max-position-embeddings", "9"]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert message in str(ended.value)
    assert not (tmp_path / "long").exists()


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    with pytest.raises(SystemExit, match=r"--save .* is not an empty folder: give another, or delete it"):
        main(["--hf-model", str(tmp_path), "--save", str(tmp_path), "--max-position-embeddings", "9"])
