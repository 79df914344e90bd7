"""The two layer specs behind ``--transformer-impl``, both with shared-prefix attention as their core.

``local``: Megatron-Core's own linears, on CPU and GPU. ``transformer_engine``: TE's, on GPU; fp8 needs them. All else
is the same, so that a checkpoint of one loads with the other, and a dry run of one tells the memory of both.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_longpo import platform
from megatron_longpo.attention.core_attention import SharedPrefixAttention
from megatron_longpo.config import ModelConfig
from megatron_longpo.config.training import FLASH
from megatron_longpo.model.layer import FrugalLayer
from megatron_longpo.model.remade import remade
from megatron_longpo.model.swiglu import SwiGLU


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with Megatron's constructor, and with sequence parallel, which Megatron's own wrapper refuses.

    Under sequence parallel every rank normalises other tokens, so the gradient of the weight is a sum over ranks:
    Megatron all-reduces the gradients of parameters that carry ``sequence_parallel``.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension; the result is not kept for the backward pass of what it goes into."""
        return remade(super().forward, hidden)


def block_spec(
    model: ModelConfig,
    transformer_impl: str,
    num_local_layers: int,
    mlp_chunk_tokens: int | None = None,
    attention_backend: str = FLASH,
) -> TransformerBlockSubmodules:
    """The submodules of one pipeline stage's transformer block.

    Args:
        model: Shape of the model.
        transformer_impl: ``local`` or ``transformer_engine``.
        num_local_layers: Layers that this stage holds.
        mlp_chunk_tokens: As `FrugalLayer`'s.
        attention_backend: As `SharedPrefixAttention`'s.

    Raises:
        ValueError: ``transformer_engine`` is asked for and not installed.
    """
    layer = _local_layer(model)
    if transformer_impl == "transformer_engine":
        _use_transformer_engine(layer)
    layer.submodules.self_attention.submodules.core_attention = ModuleSpec(
        SharedPrefixAttention, {"backend": attention_backend}
    )
    if model.swiglu:
        platform.mlp_submodules(layer.submodules.mlp).activation_func = SwiGLU
    layer.module = FrugalLayer
    layer.params = {**layer.params, "mlp_chunk_tokens": mlp_chunk_tokens}
    return TransformerBlockSubmodules(layer_specs=[layer] * num_local_layers, layer_norm=RMSNorm)


def _local_layer(model: ModelConfig) -> ModuleSpec:
    layer = get_gpt_layer_local_spec(qk_layernorm=model.qk_layernorm, normalization="RMSNorm")
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.q_layernorm = attention.k_layernorm = RMSNorm if model.qk_layernorm else IdentityOp
    return layer


def _use_transformer_engine(layer: ModuleSpec) -> None:
    from megatron.core.extensions import transformer_engine

    # Where it is missing the module is there all the same, with stand-ins for its classes.
    if not transformer_engine.HAVE_TE:
        raise ValueError(
            "--transformer-impl transformer_engine needs Transformer Engine, which is not installed: use "
            "--transformer-impl local, an NGC image, or install it as docs/gpu.md says"
        )
    attention, mlp = layer.submodules.self_attention.submodules, platform.mlp_submodules(layer.submodules.mlp)
    # Not those that have the norm inside: they keep its output for the backward pass.
    attention.linear_qkv = mlp.linear_fc1 = transformer_engine.TEColumnParallelLinear
    attention.linear_proj = mlp.linear_fc2 = transformer_engine.TERowParallelLinear
