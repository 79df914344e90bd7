"""The model's shape, and the rows that are cut for it."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_longpo.config import RunConfig
from megatron_longpo.config.data import split_shares
from megatron_longpo.validation.multiples import nearest_multiple


def _model(config: RunConfig, world_size: int) -> Iterator[str]:
    model = config.model
    for name in ("num_layers", "hidden_size", "num_attention_heads"):
        if getattr(model, name) == 0:
            yield f"--{name.replace('_', '-')} is required: give it, or --load-hf, or --use-checkpoint-args"
    if model.num_layers and not model.swiglu:
        yield "--swiglu is required: the supported families (Llama, Mistral, Qwen) have no other MLP"
    if model.num_layers and not model.disable_bias_linear:
        yield "--disable-bias-linear is required: the supported families have no bias in linear layers"
    heads, groups = model.num_attention_heads, model.num_query_groups
    derived = heads and model.hidden_size % heads and model.kv_channels == model.hidden_size // heads
    if derived and "kv_channels" not in config.explicit:
        yield (
            f"--hidden-size {model.hidden_size} must be a multiple of --num-attention-heads {heads}, "
            f"or give --kv-channels; nearest: {nearest_multiple(model.hidden_size, heads)}"
        )
    if model.kv_channels % 2:
        yield f"--kv-channels {model.kv_channels} must be even: RoPE turns pairs of dimensions"
    if groups and heads % groups:
        yield f"--num-attention-heads {heads} must be a multiple of --num-query-groups {groups}"
    if model.use_rope_scaling and model.rope_low_freq_factor >= model.rope_high_freq_factor:
        yield (
            f"--rope-low-freq-factor {model.rope_low_freq_factor:g} must be less than "
            f"--rope-high-freq-factor {model.rope_high_freq_factor:g}"
        )
    if model.position_embedding_type == "yarn" and model.yarn_beta_slow >= model.yarn_beta_fast:
        yield f"--yarn-beta-slow {model.yarn_beta_slow:g} must be less than --yarn-beta-fast {model.yarn_beta_fast:g}"


def _data(config: RunConfig, world_size: int) -> Iterator[str]:
    data, model, parallel = config.data, config.model, config.parallel
    if not data.data_path:
        yield "--data-path is required: the PREFIX that tools/preprocess_pairs.py wrote"
    try:
        split_shares(data.split)
    except ValueError as error:
        yield str(error)
    if data.seq_length > model.max_position_embeddings:
        yield (
            f"--seq-length {data.seq_length} is longer than --max-position-embeddings "
            f"{model.max_position_embeddings}; to train a longer context give --max-position-embeddings "
            f"{data.seq_length} (and usually a greater --rotary-base)"
        )
    cp, tp = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    factors = {"2*cp": 2 * cp if cp > 1 else 1, "tp": tp if parallel.sequence_parallel else 1}
    factors = {name: factor for name, factor in factors.items() if factor > 1}
    multiple = parallel.row_multiple * (2 if cp > 1 else 1)
    if data.seq_length % multiple:
        yield (
            f"--seq-length {data.seq_length} must be a multiple of {'*'.join(factors)} = {multiple}; "
            f"nearest: {nearest_multiple(data.seq_length, multiple)}"
        )


CHECKS = (_model, _data)
