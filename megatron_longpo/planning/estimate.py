"""A quick estimate of peak memory, to leave out layouts that cannot fit before the others are measured."""

# t=tokens of a rank H=hidden_size F=ffn N=query heads G=key/value heads D=head_dim

from __future__ import annotations

from dataclasses import dataclass

from megatron_longpo.config import RunConfig
from megatron_longpo.model.flops import layer_weights
from megatron_longpo.planning.recomputation import repeated
from megatron_longpo.planning.saved import (
    element_bytes,
    kept_bytes,
    local_tokens,
    offloaded_share,
    whole_layer_bytes,
)
from megatron_longpo.planning.workload import Work

LAYERS_ON_THE_WAY = 2
"""Offloaded layers whose saved tensors are on the device: one in backward, and the next one that comes back."""


@dataclass(frozen=True)
class Estimate:
    """Peak memory of the fullest rank.

    Args:
        gib: Of the device, GiB.
        host_gib: Of the host, GiB.
    """

    gib: float
    host_gib: float


def estimate(config: RunConfig, num_gpus: int, work: Work) -> Estimate:
    """The fuller of the first and the last pipeline stage."""
    stages = [_of_stage(config, num_gpus, work, last) for last in (False, True)]
    return Estimate(max(device for device, _ in stages) / 2**30, max(host for _, host in stages) / 2**30)


def _of_stage(config: RunConfig, num_gpus: int, work: Work, last: bool) -> tuple[float, float]:
    """Bytes of device and host."""
    model, parallel, training = config.model, config.parallel, config.training
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    vocabulary = model.padded_vocab_size(tp) * model.hidden_size / tp
    tables = 1 if pp > 1 or not model.untie_embeddings_and_output_weights else 2
    parameters = model.num_layers / pp * layer_weights(model) / tp + tables * vocabulary
    ranks = parallel.context_parallel_size * parallel.data_parallel_size(num_gpus)
    updated = parameters / ranks if parallel.use_distributed_optimizer else parameters
    size, tokens = element_bytes(config), local_tokens(config, work)
    device, host = parameters * (size + 4), 0.0
    if config.optimizer.optimizer_cpu_offload:
        # Weight, gradient and moments of the shard; while it is built, the weights of the whole rank.
        host += max(16 * updated, 4 * (parameters + updated))
    else:
        device += (12 if training.bf16 else 8) * updated

    one_layer, kept = whole_layer_bytes(config, work), kept_bytes(config, work)
    layers = model.num_layers / pp * _rows_under_way(config, num_gpus, last)
    offloaded = offloaded_share(config)
    host += kept * layers * offloaded
    device += kept * (layers * (1 - offloaded) + (LAYERS_ON_THE_WAY if offloaded else 0))
    again = repeated(config).layers > 0 or training.recompute_granularity == "selective"
    # A layer in backward: what it computes again, and gradients of about the size of its widest tensors.
    inner_tokens = tokens if training.mlp_chunk_tokens is None else min(tokens, training.mlp_chunk_tokens)
    inner = size * inner_tokens * model.ffn_hidden_size / tp
    device += one_layer * again + 3 * inner + (3 * inner if training.mlp_chunk_tokens is not None else 0.0)
    keys = size * 2 * work.layout.padded_tokens * model.kv_width / tp
    # What a layer gets and its gradient, of all tensor-parallel ranks where they are gathered as a whole.
    own_tokens = tokens / tp if parallel.sequence_parallel else tokens
    at_once = own_tokens if training.projection_chunk_tokens is not None else tokens
    device += keys * 3 + 2 * size * at_once * model.hidden_size
    if last:
        logits = training.logits_chunk_tokens * model.padded_vocab_size(tp) / tp
        head = 8 * vocabulary + 6 * logits + 3 * size * tokens * model.hidden_size
        # With recomputation the LM head's peak and a layer's do not meet.
        device += max(0.0, head - one_layer) if again else head
    return device, host


def _rows_under_way(config: RunConfig, num_gpus: int, last: bool) -> float:
    """Micro-batches whose activations a stage holds, in units of all its layers (arXiv 2104.04473, section 2.2)."""
    stages, micro_batches = config.parallel.pipeline_model_parallel_size, config.num_microbatches(num_gpus)
    virtual = config.num_virtual_stages
    if virtual is None:
        return 1 if last else min(stages, micro_batches)
    warm_up = (virtual - 1) * stages + (0 if last else 2 * (stages - 1)) + 1
    return min(warm_up, virtual * micro_batches) / virtual
