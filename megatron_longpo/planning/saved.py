"""Bytes that a layer saves for its backward pass, on the device and on the host.

Per token and layer, in the training dtype: the norms' inputs 2H (split over TP with sequence parallel), queries, keys,
values and attention's output, the MLP's gate and up 2F, RoPE's cosines and sines; the outputs of norms and gate are
made again (`model.remade`). The same counting as in arXiv 2205.05198, section 4.1.
"""

# t=tokens of a rank H=hidden_size F=ffn N=query heads G=key/value heads D=head_dim

from __future__ import annotations

from megatron_longpo.config import RunConfig
from megatron_longpo.planning.recomputation import repeated
from megatron_longpo.planning.workload import Work


def element_bytes(config: RunConfig) -> int:
    """Bytes of a value in the training dtype."""
    return 2 if config.training.bf16 else 4


def whole_layer_bytes(config: RunConfig, work: Work) -> float:
    """A layer that recomputes nothing of itself; with ``--mlp-chunk-tokens`` its MLP half saves its input alone."""
    model, parallel = config.model, config.parallel
    tp, size = parallel.tensor_model_parallel_size, element_bytes(config)
    in_pieces = config.training.mlp_chunk_tokens is not None
    hidden = 2 * model.hidden_size / (tp if parallel.sequence_parallel else 1)
    inner = 2 * model.query_width + 2 * model.kv_width + (0 if in_pieces else 2 * model.ffn_hidden_size)
    return size * local_tokens(config, work) * (hidden + inner / tp + 4 * model.kv_channels)


def kept_bytes(config: RunConfig, work: Work) -> float:
    """What a layer keeps between forward and backward pass, on the device or the host; the average of all layers."""
    model, training, parallel = config.model, config.training, config.parallel
    tp, size, tokens = parallel.tensor_model_parallel_size, element_bytes(config), local_tokens(config, work)
    layer = whole_layer_bytes(config, work)
    if training.recompute_granularity == "full":
        recomputed = repeated(config).layers
        hidden = size * tokens * model.hidden_size / (tp if parallel.sequence_parallel else 1)
        if training.recompute_keep_attention:
            hidden += size * tokens * model.query_width / tp
        return recomputed * hidden + (1 - recomputed) * layer
    if training.recompute_granularity == "selective" and "mlp" in training.recompute_modules:
        return layer - size * 2 * tokens * model.ffn_hidden_size / tp
    return layer


def offloaded_share(config: RunConfig) -> float:
    """Share of the layers whose saved tensors wait on the host."""
    return config.training.cpu_offloading_num_layers / config.layers_per_chunk


def local_tokens(config: RunConfig, work: Work) -> float:
    """Tokens that a context-parallel rank computes."""
    return work.layout.padded_tokens / config.parallel.context_parallel_size
