"""The model families: which Megatron parameter is made of which Hugging Face tensors, one declarative map each.

``{}`` stands for the number of the layer, from 0. Megatron's names are those of its ``torch_dist`` checkpoints, where a
norm's weight belongs to the linear that follows it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_longpo.config import ModelConfig
from megatron_longpo.conversion.layouts import Columns, GateUp, Layout, QueryKeyValue, Replicated, Vocabulary
from megatron_longpo.conversion.torch_dist import Place


@dataclass(frozen=True)
class Weight:
    """One Megatron parameter, or with ``{}`` in its name one per layer.

    Args:
        megatron: Its name in a checkpoint.
        hf: Names of the Hugging Face tensors that it is made of.
        layout: How.
        layer: The layer, in a map that `Family.weights` expanded; None outside the layers.
    """

    megatron: str
    hf: tuple[str, ...]
    layout: Layout
    layer: int | None = None

    @property
    def name(self) -> str:
        """The Megatron parameter's name with the layer's number."""
        return self.megatron.format(self.layer)

    def place(self, num_layers: int) -> Place:
        """Where a checkpoint of a model with this many layers has it."""
        if self.layer is None:
            return Place(self.megatron)
        return Place(self.megatron.replace(".{}", ""), self.layer, num_layers)

    def of_layer(self, layer: int) -> Weight:
        """The same parameter of one layer."""
        return replace(self, hf=tuple(name.format(layer) for name in self.hf), layer=layer)


@dataclass(frozen=True)
class Family:
    """Models that share one map.

    Args:
        architecture: Hugging Face's class name, as ``architectures`` in config.json gives it.
        layer_weights: The map.
        qkv_bias, qk_norm: `ModelConfig.add_qkv_bias` and `ModelConfig.qk_layernorm`.
        sliding_window: transformers' model has one window for all layers, ``sliding_window`` in its configuration.
        required: Fields of the Hugging Face configuration that must have these values where they exist.
    """

    architecture: str
    layer_weights: tuple[Weight, ...]
    qkv_bias: bool = False
    qk_norm: bool = False
    sliding_window: bool = False
    required: Mapping[str, Any] = field(default_factory=dict)

    def refuse_window(self, model: ModelConfig) -> None:
        """Raise ValueError where a model has a window that no configuration of this architecture can say."""
        if model.window_size.num_tokens is not None and not self.sliding_window:
            able = ", ".join(name for name, family in FAMILIES.items() if family.sliding_window)
            raise ValueError(
                f"--window-size {model.window_size}: {self.architecture} has no window of all layers in transformers, "
                f"so the model could not be exported; leave it out ({able} has one)"
            )

    def weights(self, model: ModelConfig) -> Iterator[Weight]:
        """Every parameter of a model, in the order of computation."""
        yield EMBEDDING
        for layer in range(model.num_layers):
            for weight in self.layer_weights:
                yield weight.of_layer(layer)
        yield _FINAL_NORM
        if model.untie_embeddings_and_output_weights:
            yield LM_HEAD


EMBEDDING = Weight("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), Vocabulary())
_FINAL_NORM = Weight("decoder.final_layernorm.weight", ("model.norm.weight",), Replicated())
LM_HEAD = Weight("output_layer.weight", ("lm_head.weight",), Vocabulary())

_ATTENTION, _HF_ATTENTION = "decoder.layers.{}.self_attention.", "model.layers.{}.self_attn."
_MLP, _HF_MLP = "decoder.layers.{}.mlp.", "model.layers.{}.mlp."

_QKV = Weight(
    _ATTENTION + "linear_qkv.weight",
    (_HF_ATTENTION + "q_proj.weight", _HF_ATTENTION + "k_proj.weight", _HF_ATTENTION + "v_proj.weight"),
    QueryKeyValue(),
)
_QKV_BIAS = Weight(
    _ATTENTION + "linear_qkv.bias",
    (_HF_ATTENTION + "q_proj.bias", _HF_ATTENTION + "k_proj.bias", _HF_ATTENTION + "v_proj.bias"),
    QueryKeyValue(bias=True),
)
_QUERY_NORM = Weight(
    _ATTENTION + "q_layernorm.weight", (_HF_ATTENTION + "q_norm.weight",), Replicated(width="kv_channels")
)
_KEY_NORM = Weight(
    _ATTENTION + "k_layernorm.weight", (_HF_ATTENTION + "k_norm.weight",), Replicated(width="kv_channels")
)
_BEFORE_ATTENTION = (
    Weight(_ATTENTION + "linear_qkv.layer_norm_weight", ("model.layers.{}.input_layernorm.weight",), Replicated()),
)
_AFTER_ATTENTION = (
    Weight(_ATTENTION + "linear_proj.weight", (_HF_ATTENTION + "o_proj.weight",), Columns(attention=True)),
    Weight(_MLP + "linear_fc1.layer_norm_weight", ("model.layers.{}.post_attention_layernorm.weight",), Replicated()),
    Weight(_MLP + "linear_fc1.weight", (_HF_MLP + "gate_proj.weight", _HF_MLP + "up_proj.weight"), GateUp()),
    Weight(_MLP + "linear_fc2.weight", (_HF_MLP + "down_proj.weight",), Columns(attention=False)),
)

FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (
        Family(
            "LlamaForCausalLM",
            (*_BEFORE_ATTENTION, _QKV, *_AFTER_ATTENTION),
            required={"attention_bias": False, "mlp_bias": False},
        ),
        Family("MistralForCausalLM", (*_BEFORE_ATTENTION, _QKV, *_AFTER_ATTENTION), sliding_window=True),
        Family("Qwen2ForCausalLM", (*_BEFORE_ATTENTION, _QKV, _QKV_BIAS, *_AFTER_ATTENTION), qkv_bias=True),
        Family(
            "Qwen3ForCausalLM",
            (*_BEFORE_ATTENTION, _QKV, _QUERY_NORM, _KEY_NORM, *_AFTER_ATTENTION),
            qk_norm=True,
            required={"attention_bias": False},
        ),
    )
}
"""Llama 2 to 3.3; Mistral 7B and Nemo; Qwen2 and Qwen2.5; Qwen3 dense. By architecture."""

NOT_WEIGHTS = ("rotary_emb.inv_freq",)
"""Endings of tensors that old checkpoints carry and that are computed from the configuration."""
