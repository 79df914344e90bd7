"""Small random Hugging Face models, one of every kind that the families know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from megatron_longpo.config import RunConfig
from megatron_longpo.conversion.hf_config import read_hf_model

_SHAPE: dict[str, Any] = {
    # 131 entries: padded for every TP size. Two groups: TP 2 holds one each.
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "attn_implementation": "eager",
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 1024}

MODELS: dict[str, tuple[type[PreTrainedModel], Any, dict[str, Any]]] = {
    "llama2": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "llama3.1": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": _LLAMA3_ROPE}),
    "llama3.2-tied": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": True}),
    # Shorter than `random_tokens`.
    "mistral-v0.1": (MistralForCausalLM, MistralConfig, {"sliding_window": 16}),
    "mistral-v0.2": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "mistral-nemo": (MistralForCausalLM, MistralConfig, {"sliding_window": None, "head_dim": 8}),
    "qwen2.5": (Qwen2ForCausalLM, Qwen2Config, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2.5-yarn-tied": (Qwen2ForCausalLM, Qwen2Config, {"rope_parameters": _YARN_ROPE, "tie_word_embeddings": True}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
}
"""Model class, configuration class and what differs from `_SHAPE`, by name."""


def random_model(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model whose every parameter is random, biases and norms too: a wrong place for any of them changes logits."""
    model_class, config_class, settings = MODELS[name]
    model = model_class(config_class(**_SHAPE | settings | changes)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            offset = 1.0 if "norm" in key else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15 + offset)
    return model


def save_random_model(folder: Path, name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """Save a random model as a Hugging Face folder and return it."""
    model = random_model(name, **changes).to(dtype)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def hf_logits(model: PreTrainedModel, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """fp32 logits ``[T, V]`` of one causal sequence whose positions may lie anywhere; a window counts tokens."""
    # Without a mask transformers takes a jump in the positions for the start of another sequence.
    mask = torch.ones(1, len(tokens))
    return model(input_ids=tokens[None], position_ids=positions[None], attention_mask=mask).logits[0].float()


def random_tokens(num_tokens: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and ascending positions, far apart and far beyond the original length of the scaled models."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, _SHAPE["vocab_size"], (num_tokens,), generator=generator)
    return tokens, torch.randperm(_SHAPE["max_position_embeddings"], generator=generator)[:num_tokens].sort().values


def run_config(folder: Path, **flags: Any) -> RunConfig:
    """The run of ``--load-hf FOLDER`` on the CPU, with further flags by their keys."""
    values = {"load_hf": str(folder), "use_cpu": True, "progress_bar": "off", "seq_length": 64} | flags
    config = RunConfig.from_flat_dict(values, explicit=values)
    return config.with_model(read_hf_model(folder)).with_device_defaults("local", "gloo")


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors in the safetensors files of a folder."""
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def assert_same_weights(one: Path, other: Path) -> None:
    """The same names, types and bits."""
    ours, theirs = weights_of(one), weights_of(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        assert value.view(torch.uint8).equal(theirs[name].view(torch.uint8)), name
