"""RoPE in an exported config.json: said once for every generation of transformers, and read back.

transformers 4 reads ``rope_theta`` and ``rope_scaling``. Where they are missing it takes base 10,000 and no scaling,
even beside ``rope_parameters`` (vllm-project/vllm#42624). transformers 5 reads ``rope_parameters``; but
``rope_scaling``, with the ``rope_theta`` beside it, goes first. So every reader must find its own keys, and all of them
must say the same.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from megatron_longpo.config import ModelConfig
from megatron_longpo.conversion.hf_config import CONFIG_FILE, read_hf_model
from megatron_longpo.model.rope import attention_factor, inverse_frequencies


def rope_parameters(model: ModelConfig) -> dict[str, Any]:
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


def stored_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """The parameters that a config.json holds, from the key that transformers 5 takes first."""
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def write_rope(config: dict[str, Any], old: dict[str, Any], new: dict[str, Any]) -> None:
    """Put RoPE's parameters into every key that a reader of the configuration may take them from.

    A configuration of transformers 4 stays one, since transformers 5 reads it too; one of transformers 5 also gets the
    keys of transformers 4.

    Args:
        config: A config.json, changed in place.
        old: `rope_parameters` that it says; values that stay are not touched. Empty writes all of ``new``.
        new: `rope_parameters` that it shall say.
    """
    changed = {name: value for name, value in new.items() if old.get(name) != value}
    removed = set(old) - set(new)
    if changed.keys() - {"rope_theta"} or removed:
        # Names of older releases, and what is derived from the rest.
        removed |= {"type", "attention_factor"}
        changed["rope_type"] = new["rope_type"]
    newer = is_newer(config)
    top_level = {"rope_theta": config["rope_theta"]} if "rope_theta" in config else {}
    stored = top_level | stored_parameters(config)
    rope = {name: value for name, value in stored.items() if name not in removed} | changed
    if newer:
        rope = {"rope_theta": new["rope_theta"], "rope_type": new["rope_type"]} | rope
        config["rope_parameters"] = rope
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
    if new["rope_type"] != "default":
        config["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    elif "rope_scaling" in config:
        config["rope_scaling"] = None


def refuse_other_rope(config: dict[str, Any], model: ModelConfig) -> None:
    """Raise ValueError where transformers would read another RoPE from a config.json than the model's.

    Args:
        config: What will be written; of a quantised model too.
        model: The model that it belongs to.
    """
    with tempfile.TemporaryDirectory() as folder:
        readable = {name: value for name, value in config.items() if name != "quantization_config"}
        (Path(folder) / CONFIG_FILE).write_text(json.dumps(readable), encoding="utf-8")
        read = read_hf_model(folder)
    frequencies = inverse_frequencies(read).equal(inverse_frequencies(model))
    if frequencies and attention_factor(read) == attention_factor(model):
        return
    found, wanted = rope_parameters(read), rope_parameters(model)
    different = [
        f"{name} {found.get(name)} instead of the checkpoint's {wanted.get(name)}"
        for name in wanted | found
        if found.get(name) != wanted.get(name)
    ]
    raise ValueError(
        f"transformers would read {', '.join(different)} from the exported {CONFIG_FILE}, and so another RoPE than the "
        f"one trained: remove what contradicts it from the {CONFIG_FILE} of --hf-model (a 0 counts as absent there)"
    )


def is_newer(config: dict[str, Any]) -> bool:
    """Whether transformers 5 wrote it: RoPE's base is in ``rope_parameters`` then, and ``torch_dtype`` is ``dtype``."""
    if "rope_parameters" in config:
        return True
    return "rope_theta" not in config and str(config.get("transformers_version", "4")).split(".")[0] >= "5"
