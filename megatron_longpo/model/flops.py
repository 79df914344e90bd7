"""Model FLOPs of a training step on the shared-prefix layout."""

# T=tokens P=prefix tokens L=branch tokens K=predictions N=heads D=head_dim H=hidden_size F=ffn V=vocab

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from megatron_longpo.config import ModelConfig
from megatron_longpo.data.layout import RowLayout


@lru_cache(maxsize=1024)
def attended_pairs(layout: RowLayout) -> int:
    """Query-key pairs that attention computes: of every token the positions up to its own that the window holds.

    Without a window P(P+1)/2 per prefix and L·P + L(L+1)/2 per branch.
    """

    def first(num_tokens: int) -> int:
        """Pairs of the first tokens of one sequence."""
        seen = num_tokens if layout.window_tokens is None else min(num_tokens, layout.window_tokens)
        return seen * (seen + 1) // 2 + (num_tokens - seen) * seen

    return sum(first(s.first_position + s.num_tokens) - first(s.first_position) for s in layout.segments)


def attention_flops(model: ModelConfig, layout: RowLayout) -> float:
    """Forward FLOPs of attention in all layers: 4·N·D per pair (QKᵀ and PV) that the model's window holds."""
    pairs = attended_pairs(replace(layout, window_tokens=model.window_size.num_tokens))
    return 4.0 * model.num_layers * model.query_width * pairs


def layer_weights(model: ModelConfig) -> int:
    """Weights of a layer's matrices."""
    return model.hidden_size * (2 * model.query_width + 2 * model.kv_width + 3 * model.ffn_hidden_size)


def forward_flops(model: ModelConfig, layout: RowLayout, num_predictions: int) -> float:
    """Multiply-adds of one forward pass, counted as 2 FLOPs each; norms and element-wise work not counted.

    Matrix products 2·T·weights, `attention_flops`, LM head 2·H·V per prediction.
    """
    matmul = 2.0 * model.num_layers * layout.num_tokens * layer_weights(model)
    head = 2.0 * model.hidden_size * model.vocab_size * num_predictions
    return matmul + attention_flops(model, layout) + head


def step_flops(model: ModelConfig, layout: RowLayout, num_predictions: int) -> float:
    """Forward plus backward: three times the forward, recomputation not counted (the usual meaning of model FLOPs)."""
    return 3.0 * forward_flops(model, layout, num_predictions)
