"""A quick estimate of peak memory, to leave out layouts that cannot fit before the others are measured.

Per token and layer, what backward needs of the unfused layers in the training dtype: norms' inputs and outputs 4H
(split over TP with sequence parallel), queries, keys, values and attention's output, the MLP's hidden layer five times
(gate, linear, linear plus its offset, activated gate, product), RoPE's cosines and sines. The same counting as in arXiv
2205.05198, section 4.1.
"""

# t=tokens of a rank H=hidden_size F=ffn N=query heads G=key/value heads D=head_dim

from __future__ import annotations

from megatron_longpo.config import RunConfig
from megatron_longpo.planning.recomputation import repeated
from megatron_longpo.planning.step_time import layer_weights, num_virtual
from megatron_longpo.planning.workload import Work


def estimated_gib(config: RunConfig, num_gpus: int, work: Work) -> float:
    """Peak memory of the fullest rank, GiB."""
    return max(_of_stage(config, num_gpus, work, last) for last in (False, True)) / 2**30


def _of_stage(config: RunConfig, num_gpus: int, work: Work, last: bool) -> float:
    model, parallel, training = config.model, config.parallel, config.training
    tp, pp, cp = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    size = 2 if training.bf16 else 4
    vocabulary = model.padded_vocab_size(tp) * model.hidden_size / tp
    tables = 1 if pp > 1 or not model.untie_embeddings_and_output_weights else 2
    parameters = model.num_layers / pp * layer_weights(model) / tp + tables * vocabulary
    sharded = cp * parallel.data_parallel_size(num_gpus) if parallel.use_distributed_optimizer else 1
    num_bytes = parameters * (size + 4 + (12 if training.bf16 else 8) / sharded)

    tokens = work.layout.padded_tokens / cp
    one_layer = tokens * _layer_bytes_per_token(config)
    hidden = size * tokens * model.hidden_size / (tp if parallel.sequence_parallel else 1)
    again = repeated(config)
    if training.recompute_granularity == "full":
        kept = again.matmul * hidden + (1 - again.matmul) * one_layer
        if training.recompute_keep_attention:
            kept += again.matmul * size * tokens * model.num_attention_heads * model.kv_channels / tp
    else:
        mlp = size * 5 * tokens * model.ffn_hidden_size / tp
        kept = one_layer - (mlp if again.matmul else 0.0)
    num_bytes += kept * model.num_layers / pp * _rows_under_way(config, num_gpus, last)
    # A layer in backward: what it computes again, and gradients of about the size of its widest tensors.
    num_bytes += one_layer * (again.matmul > 0) + size * 3 * tokens * model.ffn_hidden_size / tp
    keys = size * 2 * work.layout.padded_tokens * model.num_query_groups * model.kv_channels / tp
    num_bytes += keys * 3 + 2 * size * tokens * model.hidden_size
    if last:
        logits = training.logits_chunk_tokens * model.padded_vocab_size(tp) / tp
        head = 8 * vocabulary + 6 * logits + 3 * size * tokens * model.hidden_size
        # With recomputation the LM head's peak and a layer's do not meet.
        num_bytes += head if again.matmul == 0 else max(0.0, head - one_layer)
    return num_bytes


def _layer_bytes_per_token(config: RunConfig) -> float:
    model, parallel = config.model, config.parallel
    tp, size = parallel.tensor_model_parallel_size, 2 if config.training.bf16 else 4
    query, key = (heads * model.kv_channels for heads in (model.num_attention_heads, model.num_query_groups))
    whole = 4 * model.hidden_size / (tp if parallel.sequence_parallel else 1)
    return size * (whole + (2 * query + 2 * key + 5 * model.ffn_hidden_size) / tp + 4 * model.kv_channels)


def _rows_under_way(config: RunConfig, num_gpus: int, last: bool) -> float:
    """Micro-batches whose activations a stage holds, in units of all its layers (arXiv 2104.04473, section 2.2)."""
    stages, micro_batches = config.parallel.pipeline_model_parallel_size, config.num_microbatches(num_gpus)
    virtual = num_virtual(config)
    if virtual == 1:
        return 1 if last else min(stages, micro_batches)
    warm_up = (virtual - 1) * stages + (0 if last else 2 * (stages - 1)) + 1
    return min(warm_up, virtual * micro_batches) / virtual
