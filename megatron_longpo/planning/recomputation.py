"""Which share of a layer's forward pass is computed a second time in the backward pass."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_longpo.config import RunConfig


@dataclass(frozen=True)
class Repeated:
    """Shares of all layers' forward passes, 0 to 1.

    Args:
        matmul: Of the matrix products and what is element by element between them.
        attention: Of attention and its exchange of keys and values.
    """

    matmul: float
    attention: float


def repeated(config: RunConfig) -> Repeated:
    """What the flags of recomputation repeat (arXiv 2205.05198, section 5)."""
    training, model = config.training, config.model
    if training.recompute_granularity == "full":
        local = model.num_layers // config.parallel.pipeline_model_parallel_size
        local = config.parallel.num_layers_per_virtual_pipeline_stage or local
        share = (training.recompute_num_layers or 0) / local if training.recompute_method == "block" else 1.0
        return Repeated(share, 0.0 if training.recompute_keep_attention else share)
    if training.recompute_granularity == "selective":
        mlp = 3 * model.ffn_hidden_size
        heads = model.num_attention_heads * model.kv_channels
        whole = mlp + 2 * heads + 2 * model.num_query_groups * model.kv_channels
        matmul = mlp / whole if "mlp" in training.recompute_modules else 0.0
        return Repeated(matmul, 1.0 if "core_attn" in training.recompute_modules else 0.0)
    return Repeated(0.0, 0.0)
