"""The two layer specs behind ``--transformer-impl``, both with shared-prefix attention as their core.

``local``: Megatron-Core's own linears, on CPU and GPU. ``transformer_engine``: TE's, on GPU; fp8 needs them. All else
is the same, so that a checkpoint of one loads with the other, and a dry run of one tells the memory of both.
"""

from __future__ import annotations

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_longpo import platform
from megatron_longpo.attention.core_attention import SharedPrefixAttention
from megatron_longpo.config import ModelConfig
from megatron_longpo.config.training import FLASH
from megatron_longpo.model.layer import FrugalLayer
from megatron_longpo.model.norm import RMSNorm
from megatron_longpo.model.projections import PieceProjection
from megatron_longpo.model.swiglu import SwiGLU


def block_spec(
    model: ModelConfig,
    transformer_impl: str,
    num_local_layers: int,
    attention_backend: str = FLASH,
    **chunk_tokens: int | None,
) -> TransformerBlockSubmodules:
    """The submodules of one pipeline stage's transformer block.

    Args:
        model: Shape of the model.
        transformer_impl: ``local`` or ``transformer_engine``.
        num_local_layers: Layers that this stage holds.
        attention_backend: As `SharedPrefixAttention`'s.
        chunk_tokens: The pieces of the row that `FrugalLayer` takes, by the names of its arguments.

    Raises:
        ValueError: ``transformer_engine`` is asked for and not installed.
    """
    layer = _local_layer(model)
    if transformer_impl == "transformer_engine":
        _use_transformer_engine(layer)
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = ModuleSpec(SharedPrefixAttention, {"backend": attention_backend})
    attention.linear_qkv = PieceProjection.in_front_of(attention.linear_qkv)
    attention.linear_proj = PieceProjection.in_front_of(attention.linear_proj)
    platform.mlp_submodules(layer.submodules.mlp).activation_func = SwiGLU
    layer.module = FrugalLayer
    layer.params = {**layer.params, **chunk_tokens}
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
