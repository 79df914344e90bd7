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
    """The template's config.json, in the form of its generation, with only what the checkpoint changes.

    Args:
        template: What the folder says.
        model: Shape and RoPE of the checkpoint.
        dtype: Type of the exported weights.

    Raises:
        ValueError: The checkpoint has a sliding window, and the template's architecture cannot say so.
    """
    config = dict(template.stored)
    old, new = _rope(template.model), _rope(model)
    if model.max_position_embeddings != template.model.max_position_embeddings:
        config["max_position_embeddings"] = model.max_position_embeddings
        # What transformers derives from the model's length must not follow it.
        stored = config.get("rope_parameters") or config.get("rope_scaling") or {}
        for name in ("factor", "original_max_position_embeddings"):
            if stored.get(name) is None:
                old.pop(name, None)
    _change_rope(config, old, new)
    key = "dtype" if "dtype" in config or ("torch_dtype" not in config and _is_newer(config)) else "torch_dtype"
    config[key] = str(dtype).removeprefix("torch.")
    if model.window_size != template.model.window_size:
        template.family.refuse_window(model)
        config["sliding_window"] = model.window_size.num_tokens
        config.pop("layer_types", None)  # they would still say the old one, and transformers believes them
    return config


def write_config(config: dict[str, Any], folder: Path) -> None:
    """Write config.json as transformers formats it."""
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


def copy_companions(template_folder: str | Path, folder: Path) -> None:
    """Copy the template's other files that belong to a model, where the folder has none of their own."""
    for path in _companions(template_folder):
        target = folder / path.name
        if path.is_dir():
            shutil.copytree(path, target, dirs_exist_ok=True)
        elif not target.exists():
            shutil.copyfile(path, target)


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


def _rope(model: ModelConfig) -> dict[str, Any]:
    """RoPE's parameters as transformers names them, rope_theta included."""
    rope: dict[str, Any] = {"rope_theta": model.rotary_base, "rope_type": "default"}
    if model.use_rope_scaling:
        rope |= {
            "rope_type": "llama3",
            "factor": model.rope_scaling_factor,
            "low_freq_factor": model.rope_low_freq_factor,
            "high_freq_factor": model.rope_high_freq_factor,
            "original_max_position_embeddings": model.rope_original_max_position_embeddings,
        }
    elif model.position_embedding_type == "yarn":
        rope |= {
            "rope_type": "yarn",
            "factor": model.yarn_rotary_scaling_factor,
            "original_max_position_embeddings": model.yarn_original_max_position_embeddings,
            "beta_fast": model.yarn_beta_fast,
            "beta_slow": model.yarn_beta_slow,
            "truncate": model.yarn_correction_range_round_to_int,
        }
        scales = {"mscale": model.yarn_mscale, "mscale_all_dim": model.yarn_mscale_all_dim}
        rope |= {name: value for name, value in scales.items() if value is not None}
    return rope


def _change_rope(config: dict[str, Any], old: dict[str, Any], new: dict[str, Any]) -> None:
    """Put the difference of two sets of RoPE's parameters where the configuration keeps them."""
    changed = {name: value for name, value in new.items() if old.get(name) != value}
    removed = set(old) - set(new)
    if not changed and not removed:
        return
    if not _is_newer(config) and "rope_theta" in changed:
        config["rope_theta"] = changed.pop("rope_theta")
    if changed.keys() - {"rope_theta"} or removed:
        # Names of older releases, and what is derived from the rest.
        removed |= {"type", "attention_factor"}
        changed["rope_type"] = new["rope_type"]
    key = "rope_parameters" if _is_newer(config) else "rope_scaling"
    if changed or removed:
        kept = {name: value for name, value in (config.get(key) or {}).items() if name not in removed}
        config[key] = kept | changed
    if key == "rope_scaling" and new["rope_type"] == "default" and config.get(key):
        config[key] = None


def _is_newer(config: dict[str, Any]) -> bool:
    """Whether transformers 5 wrote it: RoPE's base is in ``rope_parameters`` then, and ``torch_dtype`` is ``dtype``."""
    if "rope_parameters" in config:
        return True
    return "rope_theta" not in config and str(config.get("transformers_version", "4")).split(".")[0] >= "5"
