"""Reading the shape of a Hugging Face model, written by transformers 4 or 5, into a `ModelConfig`."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_longpo.config import ModelConfig, Window
from megatron_longpo.conversion.families import FAMILIES, Family
from megatron_longpo.model.rope import attention_factor

CONFIG_FILE = "config.json"
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class HFModel:
    """What a config.json says.

    Args:
        family: The map of its weights.
        model: Its shape.
        stored: The file's content.
    """

    family: Family
    model: ModelConfig
    stored: dict[str, Any]


def read_hf_model(folder: str | Path) -> ModelConfig:
    """The shape of the model in a Hugging Face folder.

    Raises:
        ValueError: No config.json, an unknown architecture, or something that shared-prefix attention or the supported
            layers do not have.
    """
    return read_hf_folder(folder).model


def read_hf_folder(folder: str | Path) -> HFModel:
    """`read_hf_model`, with the family and the file's content."""
    path = Path(folder) / CONFIG_FILE
    stored = _read_json(path)
    family = _family(path, stored)
    config = _with_defaults(path)
    for name, value in family.required.items():
        if getattr(config, name, value) != value:
            raise ValueError(f"{path}: {name} is {getattr(config, name)}; only {name} {value} is supported")
    if config.hidden_act != "silu":
        raise ValueError(f"{path}: hidden_act is {config.hidden_act}; only silu (SwiGLU) is supported")
    if stored.get("quantization_config"):
        raise ValueError(f"{path}: the weights are quantised (quantization_config); convert the unquantised model")
    for name in _SIZES:
        value = getattr(config, name, None)
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{path}: {name} is {value!r}; it must be a whole number of at least 1")
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    shape = {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": heads,
        "kv_channels": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "group_query_attention": groups != heads,
        "num_query_groups": groups,
        "max_position_embeddings": config.max_position_embeddings,
        "window_size": Window.of(_window(path, family, config)),
        "norm_epsilon": config.rms_norm_eps,
        "swiglu": True,
        "disable_bias_linear": True,
        "add_qkv_bias": family.qkv_bias,
        "qk_layernorm": family.qk_norm,
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        "vocab_size": config.vocab_size,
    }
    return HFModel(family, _with_rope(path, shape, _rope(path, config)), stored)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: give the folder of a Hugging Face checkpoint, with its config.json; "
            "hf download NAME --local-dir FOLDER makes one"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def _family(path: Path, stored: dict[str, Any]) -> Family:
    names = stored.get("architectures") or []
    if names not in [[name] for name in FAMILIES]:
        raise ValueError(f"{path}: architectures is {names}; supported: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[names[0]]


def _with_defaults(path: Path) -> Any:
    """The configuration as transformers' class, which knows the values that the file leaves out."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path.parent, trust_remote_code=False)
    # transformers raises many types for a wrong value, and its own validation errors.
    except Exception as error:
        raise ValueError(f"{path}: transformers cannot read it: {error}") from error


def _window(path: Path, family: Family, config: Any) -> int | None:
    """Tokens that a token of every layer sees, itself included; None is all.

    transformers applies a window at any length, so it counts even where it is as long as the model.
    """
    layers = set(getattr(config, "layer_types", None) or [])
    if other := layers - {"full_attention", "sliding_attention"}:
        raise ValueError(f"{path}: layer_types has {', '.join(sorted(other))}; only full_attention is supported")
    window = getattr(config, "sliding_window", None)
    if window is not None and (type(window) is not int or window < 1):
        raise ValueError(f"{path}: sliding_window {window!r} must be null or a number of tokens")
    if family.sliding_window:
        # transformers takes a Mistral with layer_types for a Ministral, whose layers alternate.
        if len(layers) > 1:
            raise ValueError(
                f"{path}: layer_types gives some layers a window of {window} tokens and others none, and windows of "
                "some layers only are not supported: remove layer_types and set sliding_window to null to train with "
                "full attention"
            )
        return None if layers == {"full_attention"} else window
    used = getattr(config, "use_sliding_window", False) and (not layers or "sliding_attention" in layers)
    if window is not None and used:
        raise ValueError(
            f"{path}: use_sliding_window gives the layers from max_window_layers {config.max_window_layers} on a "
            f"window of {window} tokens, and windows of some layers only are not supported: set use_sliding_window to "
            "false to train with full attention"
        )
    return None


def _rope(path: Path, config: Any) -> dict[str, Any]:
    """RoPE's parameters in the form of transformers 5, from either generation; those of single layers are refused."""
    rope = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    if nested := [name for name, value in rope.items() if isinstance(value, dict)]:
        raise ValueError(
            f"{path}: rope_parameters has parameters of its own for {', '.join(nested)}, and RoPE by kind of layer is "
            "not supported; give those of all layers without the layers' names"
        )
    rope.setdefault("rope_theta", getattr(config, "rope_theta", 10_000.0))
    rope.setdefault("rope_type", rope.get("type") or "default")
    rope.setdefault("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1.0))
    return rope


def _with_rope(path: Path, shape: dict[str, Any], rope: dict[str, Any]) -> ModelConfig:
    kind = rope["rope_type"]
    if rope["partial_rotary_factor"] not in (None, 1.0):
        raise ValueError(f"{path}: partial_rotary_factor {rope['partial_rotary_factor']} is not supported; only 1")
    shape["rotary_base"] = _number(path, rope, "rope_theta")
    if kind == "default":
        return ModelConfig(**shape)
    # transformers takes the model's own length where the original one is not given.
    original = int(rope.get("original_max_position_embeddings") or shape["max_position_embeddings"])
    try:
        if kind == "llama3":
            return ModelConfig(
                **shape,
                use_rope_scaling=True,
                rope_scaling_factor=_number(path, rope, "factor"),
                rope_low_freq_factor=_number(path, rope, "low_freq_factor"),
                rope_high_freq_factor=_number(path, rope, "high_freq_factor"),
                rope_original_max_position_embeddings=original,
            )
        if kind == "yarn":
            return _yarn(path, shape, rope, original)
    except KeyError as error:
        raise ValueError(f"{path}: RoPE scaling {kind!r} lacks {error}") from error
    raise ValueError(f"{path}: RoPE scaling {kind!r} is not supported; supported: default, llama3, yarn")


def _number(path: Path, rope: dict[str, Any], name: str) -> float:
    value = rope[name]
    if isinstance(value, (int, float)) and 0 < value < math.inf:
        return float(value)
    raise ValueError(f"{path}: RoPE's {name} is {value!r}; it must be a number greater than 0")


def _yarn(path: Path, shape: dict[str, Any], rope: dict[str, Any], original: int) -> ModelConfig:
    # mscale counts only together with mscale_all_dim, and only when neither is 0.
    has_scales = rope.get("mscale") and rope.get("mscale_all_dim")
    factor = _number(path, rope, "factor") if rope["factor"] else shape["max_position_embeddings"] / original
    model = ModelConfig(
        **shape,
        position_embedding_type="yarn",
        yarn_rotary_scaling_factor=factor,
        yarn_original_max_position_embeddings=original,
        yarn_beta_fast=float(rope.get("beta_fast") or 32),
        yarn_beta_slow=float(rope.get("beta_slow") or 1),
        yarn_mscale=_number(path, rope, "mscale") if has_scales else None,
        yarn_mscale_all_dim=_number(path, rope, "mscale_all_dim") if has_scales else None,
        yarn_correction_range_round_to_int=bool(rope.get("truncate", True)),
    )
    given = rope.get("attention_factor")
    if given is not None and not math.isclose(
        _number(path, rope, "attention_factor"), attention_factor(model), rel_tol=1e-9
    ):
        raise ValueError(
            f"{path}: YaRN's attention_factor {given} is not the one of factor, mscale and mscale_all_dim, "
            f"{attention_factor(model)}; a factor of its own is not supported"
        )
    return model
