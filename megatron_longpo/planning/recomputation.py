"""Which share of a layer's forward pass is computed a second time in the backward pass."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_longpo.config import RunConfig


@dataclass(frozen=True)
class Repeated:
    """Shares of all layers' forward passes.

    Args:
        layers: Layers that are recomputed as a whole, 0 to 1.
        matmul: Of the matrix products and what is element by element between them; above 1 where an MLP runs forward
            three times.
        attention: Of attention, and of the keys and values that it gathers or passes around a ring.
        exchange: Of the exchange of heads for tokens, which kept attention needs too: backward takes the exchanged
            queries, keys and values.
        all_reduces: Of a layer's two tensor-parallel all-reduces, how many: one is attention's, one the MLP's.
    """

    layers: float
    matmul: float
    attention: float
    exchange: float
    all_reduces: float


def repeated(config: RunConfig) -> Repeated:
    """What the flags of recomputation repeat (arXiv 2205.05198, section 5)."""
    training = config.training
    in_pieces = 0 if training.mlp_chunk_tokens is None else 1
    pieces = in_pieces * mlp_share(config)
    if training.recompute_granularity == "full":
        share = 1.0
        if training.recompute_method == "block":
            share = (training.recompute_num_layers or 0) / config.layers_per_chunk
        attention = 0.0 if training.recompute_keep_attention else share
        return Repeated(share, share + pieces, attention, share, 2 * share + in_pieces)
    if training.recompute_granularity == "selective":
        again = in_pieces or int("mlp" in training.recompute_modules)
        attention = 1.0 if "core_attn" in training.recompute_modules else 0.0
        return Repeated(0.0, again * mlp_share(config), attention, attention, again)
    return Repeated(0.0, pieces, 0.0, 0.0, in_pieces)


def mlp_share(config: RunConfig) -> float:
    """The MLP's share of a layer's matrix products."""
    model = config.model
    mlp = 3 * model.ffn_hidden_size
    return mlp / (mlp + 2 * model.query_width + 2 * model.kv_width)
