"""The files of a Hugging Face folder besides its weights: config.json with what training changed, the rest copied."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_longpo.config import ModelConfig
from megatron_longpo.config.flags import FLAGS
from megatron_longpo.conversion.hf_config import CONFIG_FILE, HFModel
from megatron_longpo.conversion.hf_rope import (
    is_newer,
    refuse_other_rope,
    rope_parameters,
    stored_parameters,
    write_rope,
)

COPIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "tekken.json",
    "chat_template*",
    "additional_chat_templates",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
"""What a template's folder gives to the export: everything that generation and tokenisation read, and licences."""

_VOCABULARIES = ("tokenizer.json", "tokenizer.model*", "vocab.*", "*.tiktoken", "tekken.json")
"""Files without one of which transformers and vLLM have no tokenizer."""


def refuse_other_template(template: HFModel, model: ModelConfig, folder: str | Path, checkpoint: Path) -> None:
    """Raise ValueError where the template is of another model than the checkpoint, in what its weights depend on."""
    different = [
        f"{field} is {getattr(template.model, field)} there and {getattr(model, field)} in the checkpoint"
        for spec in FLAGS.values()
        if spec.group == "model" and not spec.info.changeable
        if getattr(template.model, field := spec.field) != getattr(model, field)
    ]
    if different:
        raise ValueError(f"--hf-model {folder} is no template for {checkpoint}: " + "; ".join(different))


def exported_config(template: HFModel, model: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The template's config.json with only what the checkpoint changes, and a RoPE that transformers 4 and 5 both read.

    Args:
        template: What the folder says.
        model: Shape and RoPE of the checkpoint.
        dtype: Type of the exported weights.

    Raises:
        ValueError: The checkpoint has a sliding window, and the template's architecture cannot say so; or transformers
            would read another RoPE than the checkpoint's.
    """
    config = dict(template.stored)
    old, new = rope_parameters(template.model), rope_parameters(model)
    if model.max_position_embeddings != template.model.max_position_embeddings:
        config["max_position_embeddings"] = model.max_position_embeddings
        # What transformers derives from the model's length must not follow it.
        for name in ("factor", "original_max_position_embeddings"):
            if stored_parameters(config).get(name) is None:
                old.pop(name, None)
    names = [name for name in ("dtype", "torch_dtype") if name in config]
    for name in names or ["dtype" if is_newer(config) else "torch_dtype"]:
        config[name] = str(dtype).removeprefix("torch.")
    write_rope(config, old, new)
    if model.window_size != template.model.window_size:
        template.family.refuse_window(model)
        config["sliding_window"] = model.window_size.num_tokens
        config.pop("layer_types", None)  # they would still say the old one, and transformers believes them
    refuse_other_rope(config, model)
    return config


def restore_rope(folder: Path, model: ModelConfig) -> None:
    """Make the config.json that another program's export wrote say a model's RoPE to transformers 4 and 5.

    ``save_pretrained`` of transformers 5, which such programs use, writes nothing that transformers 4 reads.

    Args:
        folder: Holds the config.json, which is replaced.
        model: The model that was exported.

    Raises:
        ValueError: transformers would still read another RoPE from it.
    """
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    write_rope(config, {}, rope_parameters(model))
    refuse_other_rope(config, model)
    write_config(config, folder)


def write_config(config: dict[str, Any], folder: Path) -> None:
    """Write config.json as transformers formats it."""
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


def copy_companions(template_folder: str | Path, folder: Path) -> None:
    """Copy the template's other files that belong to a model, where the folder has none of their own."""
    for path in _companions(template_folder):
        target = folder / path.name
        if not target.exists():
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, target)


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a folder has the file that a tokenizer is made from."""
    return any(path.is_file() for pattern in _VOCABULARIES for path in Path(folder).glob(pattern))


def companions_bytes(template_folder: str | Path) -> int:
    """Size of what `copy_companions` copies."""
    files = (file for path in _companions(template_folder) for file in (path, *path.rglob("*")) if file.is_file())
    return sum(file.stat().st_size for file in files)


def _companions(template_folder: str | Path) -> Iterator[Path]:
    for pattern in COPIED:
        yield from Path(template_folder).glob(pattern)
