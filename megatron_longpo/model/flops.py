"""Model FLOPs of a training step on the shared-prefix layout."""

# T=tokens P=prefix tokens L=branch tokens K=predictions N=heads D=head_dim H=hidden_size F=ffn V=vocab

from __future__ import annotations

from megatron_longpo.config import ModelConfig
from megatron_longpo.data.layout import PREFIX, RowLayout


def attended_pairs(layout: RowLayout) -> int:
    """Query-key pairs that attention computes: P(P+1)/2 per prefix, L·P + L(L+1)/2 per branch."""
    pairs = 0
    for segment in layout.segments:
        rectangle = 0 if segment.branch == PREFIX else segment.prefix_tokens
        pairs += segment.num_tokens * rectangle + segment.num_tokens * (segment.num_tokens + 1) // 2
    return pairs


def forward_flops(model: ModelConfig, layout: RowLayout, num_predictions: int) -> float:
    """Multiply-adds of one forward pass, counted as 2 FLOPs each; norms and element-wise work not counted.

    Matrix products 2·T·weights, attention 4·N·D per pair (QKᵀ and PV), LM head 2·H·V per prediction.
    """
    head_width = model.num_attention_heads * model.kv_channels
    groups = model.num_query_groups if model.group_query_attention else model.num_attention_heads
    kv_width = groups * model.kv_channels
    mlp_matrices = 3 if model.swiglu else 2
    weights = model.hidden_size * (2 * head_width + 2 * kv_width + mlp_matrices * model.ffn_hidden_size)
    per_layer = 2.0 * layout.num_tokens * weights + 4.0 * head_width * attended_pairs(layout)
    return model.num_layers * per_layer + 2.0 * model.hidden_size * model.vocab_size * num_predictions


def step_flops(model: ModelConfig, layout: RowLayout, num_predictions: int) -> float:
    """Forward plus backward: three times the forward, recomputation not counted (the usual meaning of model FLOPs)."""
    return 3.0 * forward_flops(model, layout, num_predictions)
