"""The shape of a Hugging Face model, as transformers 4 and 5 write it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_longpo.config import ModelConfig, Window
from megatron_longpo.conversion.hf_config import read_hf_model

LLAMA31_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
MISTRAL_7B: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "sliding_window": None,
    "vocab_size": 32000,
}
QWEN25_7B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN3: dict[str, Any] = QWEN25_7B | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128}


def read(folder: Path, content: Any) -> ModelConfig:
    (folder / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return read_hf_model(folder)


def test_llama31_is_the_same_in_both_generations(tmp_path: Path) -> None:
    old = read(tmp_path, LLAMA31_8B | {"rope_theta": 5e5, "rope_scaling": LLAMA3_SCALING, "torch_dtype": "bfloat16"})
    new = read(tmp_path, LLAMA31_8B | {"rope_parameters": LLAMA3_SCALING | {"rope_theta": 5e5}, "dtype": "bfloat16"})
    assert old == new
    assert old == ModelConfig(
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=14336,
        num_attention_heads=32,
        kv_channels=128,
        group_query_attention=True,
        num_query_groups=8,
        max_position_embeddings=131072,
        rotary_base=5e5,
        use_rope_scaling=True,
        rope_scaling_factor=8.0,
        rope_low_freq_factor=1.0,
        rope_high_freq_factor=4.0,
        rope_original_max_position_embeddings=8192,
        norm_epsilon=1e-5,
        swiglu=True,
        disable_bias_linear=True,
        untie_embeddings_and_output_weights=True,
        vocab_size=128256,
    )


def test_values_that_the_file_leaves_out_are_those_of_transformers(tmp_path: Path) -> None:
    model = read(tmp_path, MISTRAL_7B)
    assert (model.num_layers, model.ffn_hidden_size, model.num_query_groups) == (32, 14336, 8)
    assert (model.kv_channels, model.norm_epsilon, model.rotary_base) == (128, 1e-6, 1e6)


def test_multi_head_attention_is_not_called_grouped(tmp_path: Path) -> None:
    model = read(tmp_path, LLAMA31_8B | {"num_key_value_heads": 32})
    assert not model.group_query_attention
    assert model.num_query_groups == 32


def test_head_dim_of_its_own(tmp_path: Path) -> None:
    assert read(tmp_path, MISTRAL_7B | {"hidden_size": 5120, "head_dim": 128}).kv_channels == 128


def test_qwen_families(tmp_path: Path) -> None:
    old, new = read(tmp_path, QWEN25_7B), read(tmp_path, QWEN3)
    assert (old.add_qkv_bias, old.qk_layernorm) == (True, False)
    assert (new.add_qkv_bias, new.qk_layernorm) == (False, True)
    assert new.kv_channels == 128


@pytest.mark.parametrize("kind", ["type", "rope_type"])
def test_yarn_of_the_model_cards(tmp_path: Path, kind: str) -> None:
    scaling = {"factor": 4.0, "original_max_position_embeddings": 32768, kind: "yarn"}
    model = read(tmp_path, QWEN25_7B | {"rope_scaling": scaling})
    assert (model.position_embedding_type, model.yarn_rotary_scaling_factor) == ("yarn", 4.0)
    assert (model.yarn_beta_fast, model.yarn_beta_slow) == (32.0, 1.0)
    assert model.yarn_original_max_position_embeddings == 32768
    assert model.yarn_correction_range_round_to_int
    assert model.yarn_mscale is None


def test_yarn_with_all_of_its_parameters(tmp_path: Path) -> None:
    scaling = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 16}
    scaling |= {"beta_slow": 2, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False}
    model = read(tmp_path, QWEN25_7B | {"rope_scaling": scaling})
    assert (model.yarn_beta_fast, model.yarn_beta_slow) == (16.0, 2.0)
    assert (model.yarn_mscale, model.yarn_mscale_all_dim) == (1.0, 0.5)
    assert not model.yarn_correction_range_round_to_int
    scaling["mscale_all_dim"] = 0.0  # transformers counts neither then
    assert read(tmp_path, QWEN25_7B | {"rope_scaling": scaling}).yarn_mscale is None


def test_a_window_counts_the_token_itself_in_transformers_and_not_in_megatron(tmp_path: Path) -> None:
    assert read(tmp_path, MISTRAL_7B).window_size == Window()
    assert read(tmp_path, MISTRAL_7B | {"sliding_window": 4096}).window_size == Window(4095, 0)
    # transformers applies it at any length, the model's own included.
    assert read(tmp_path, MISTRAL_7B | {"sliding_window": 32768}).window_size == Window(32767, 0)
    assert read(tmp_path, MISTRAL_7B | {"sliding_window": 1}).window_size == Window(0, 0)
    left_out = {name: value for name, value in MISTRAL_7B.items() if name != "sliding_window"}
    assert read(tmp_path, left_out).window_size == Window(4095, 0), "what MistralConfig makes of it"
    for kind, window in (("full_attention", Window()), ("sliding_attention", Window(4095, 0))):
        assert read(tmp_path, MISTRAL_7B | {"sliding_window": 4096, "layer_types": [kind] * 32}).window_size == window


def test_unused_windows_are_none(tmp_path: Path) -> None:
    for unused in (
        {"sliding_window": 4096, "use_sliding_window": False},
        # Used only from layer 28 on, and there are 28.
        {"sliding_window": 4096, "use_sliding_window": True},
        {"sliding_window": 4096, "use_sliding_window": True, "layer_types": ["full_attention"] * 28},
    ):
        assert read(tmp_path, QWEN25_7B | unused).window_size == Window()
        assert read(tmp_path, QWEN3 | unused).window_size == Window()


REFUSED: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", r"config\.json is not JSON"),
    "no object": ("[]", r"must hold a JSON object, not a list"),
    "other architecture": (LLAMA31_8B | {"architectures": ["GPT2LMHeadModel"]}, r"GPT2LMHeadModel.*supported: Llama"),
    "classifier": (LLAMA31_8B | {"architectures": ["LlamaForSequenceClassification"]}, r"ForSequenceClassification"),
    "no architecture": ({"model_type": "llama"}, r"architectures is \[\]; supported: LlamaForCausalLM, Mistral"),
    "no window": (MISTRAL_7B | {"sliding_window": 0}, r"sliding_window 0 must be null or a number of tokens"),
    "qwen window": (
        QWEN25_7B | {"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 7},
        r"layers from max_window_layers 7 on a window of 4096 tokens.*set use_sliding_window to false",
    ),
    "qwen layer types": (
        QWEN3 | {"sliding_window": 4096, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 28},
        r"windows of some layers only are not supported",
    ),
    "ministral layer types": (
        MISTRAL_7B | {"sliding_window": 32768, "layer_types": ["full_attention", *["sliding_attention"] * 3] * 8},
        r"layer_types gives some layers a window of 32768 tokens and others none.*remove layer_types and set",
    ),
    "other layer types": (QWEN3 | {"layer_types": ["chunked_attention"] * 28}, r"layer_types has chunked_attention"),
    "attention bias": (LLAMA31_8B | {"attention_bias": True}, r"attention_bias is True; only attention_bias False"),
    "MLP bias": (LLAMA31_8B | {"mlp_bias": True}, r"mlp_bias is True"),
    "gelu": (LLAMA31_8B | {"hidden_act": "gelu"}, r"hidden_act is gelu; only silu"),
    "quantised": (LLAMA31_8B | {"quantization_config": {"quant_method": "fp8"}}, r"weights are quantised"),
    "linear RoPE": (LLAMA31_8B | {"rope_scaling": {"type": "linear", "factor": 2.0}}, r"'linear' is not supported"),
    "partial RoPE": (LLAMA31_8B | {"partial_rotary_factor": 0.5}, r"partial_rotary_factor 0.5 is not supported"),
    "RoPE by layer": (
        LLAMA31_8B | {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 5e5}}},
        r"config\.json: rope_parameters has parameters of its own for full_attention, .* not supported; give those of",
    ),
    "own YaRN temperature": (
        QWEN25_7B | {"rope_scaling": {"type": "yarn", "factor": 4.0, "attention_factor": 2.0}},
        r"attention_factor 2.0 is not the one of factor",
    ),
    "text for a YaRN temperature": (
        QWEN25_7B | {"rope_scaling": {"type": "yarn", "factor": 4.0, "attention_factor": "high"}},
        r"config\.json: RoPE's attention_factor is 'high'; it must be a number greater than 0",
    ),
    "text for a YaRN factor": (
        QWEN25_7B | {"rope_scaling": {"type": "yarn", "factor": "four"}},
        r"config\.json: RoPE's factor is 'four'; it must be a number greater than 0",
    ),
    "broken scaling": (LLAMA31_8B | {"rope_scaling": {"type": "llama3", "factor": 2.0}}, r"config.json"),
    "no layers": (LLAMA31_8B | {"num_hidden_layers": 0}, r"config\.json: num_hidden_layers is 0; it must be a whole"),
    "negative heads": (LLAMA31_8B | {"num_key_value_heads": -8}, r"num_key_value_heads is -8; it must be a whole"),
    "no RoPE base": (MISTRAL_7B | {"rope_theta": None}, r"config\.json: RoPE's rope_theta is None; it must be a num"),
    "no list": (LLAMA31_8B | {"architectures": {"a": 1}}, r"architectures is \{'a': 1\}; supported"),
    "text for a number": (LLAMA31_8B | {"hidden_size": "wide"}, r"config\.json: transformers cannot read it"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path: Path, case: str) -> None:
    content, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        read(tmp_path, content)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere/config.json is missing: give the folder"):
        read_hf_model(tmp_path / "nowhere")
