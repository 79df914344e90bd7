"""What the ranks share: heads, layers, rows and the batch."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_longpo.config import RunConfig
from megatron_longpo.config.parallel import HIERARCHICAL
from megatron_longpo.validation.multiples import largest_divisor, nearest_multiple


def _world(config: RunConfig, world_size: int) -> Iterator[str]:
    parallel = config.parallel
    size = parallel.model_parallel_size
    if world_size % size:
        yield (
            f"the number of ranks {world_size} must be a multiple of --tensor-model-parallel-size "
            f"{parallel.tensor_model_parallel_size} * --pipeline-model-parallel-size "
            f"{parallel.pipeline_model_parallel_size} * --context-parallel-size {parallel.context_parallel_size} "
            f"= {size}; nearest: {nearest_multiple(world_size, size)}"
        )


def _tensor_parallel(config: RunConfig, world_size: int) -> Iterator[str]:
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    heads, groups = model.num_attention_heads, model.num_query_groups
    if heads % tp:
        yield f"--num-attention-heads {heads} must be a multiple of --tensor-model-parallel-size {tp}"
    if groups and groups != heads and groups % tp:
        yield (
            f"--num-query-groups {groups} must be a multiple of --tensor-model-parallel-size {tp}: every rank holds "
            f"whole key/value heads; largest that fits: {largest_divisor(groups, tp)}"
        )
    if model.ffn_hidden_size % tp:
        yield (
            f"--ffn-hidden-size {model.ffn_hidden_size} must be a multiple of --tensor-model-parallel-size {tp}; "
            f"nearest: {nearest_multiple(model.ffn_hidden_size, tp)}"
        )


def _pipeline(config: RunConfig, world_size: int) -> Iterator[str]:
    layers, parallel = config.model.num_layers, config.parallel
    pp, virtual = parallel.pipeline_model_parallel_size, parallel.num_layers_per_virtual_pipeline_stage
    if layers % pp:
        yield (
            f"--num-layers {layers} must be a multiple of --pipeline-model-parallel-size {pp}; "
            f"largest that fits: {largest_divisor(layers, pp)}"
        )
    elif virtual is not None and (layers // pp) % virtual:
        yield (
            f"--num-layers-per-virtual-pipeline-stage {virtual} must divide the {layers // pp} layers of a pipeline "
            f"stage (--num-layers {layers} / --pipeline-model-parallel-size {pp})"
        )
    elif virtual is not None and virtual == layers // pp:
        yield (
            f"--num-layers-per-virtual-pipeline-stage {virtual} has no effect here: it is all layers of a pipeline "
            f"stage; give a smaller one or remove it"
        )


def _context(config: RunConfig, world_size: int) -> Iterator[str]:
    parallel, groups = config.parallel, config.model.num_query_groups
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    name = "--num-query-groups" if config.model.group_query_attention else "--num-attention-heads"
    if cp > 1 and parallel.cp_comm_type == HIERARCHICAL:
        yield from _hierarchical(config, name)
    if cp > 1 and parallel.cp_comm_type == "a2a" and groups % (tp * cp):
        yield (
            f"--cp-comm-type a2a needs {name} {groups} to be a multiple of --tensor-model-parallel-size {tp} * "
            f"--context-parallel-size {cp} = {tp * cp}; use --cp-comm-type all_gather"
        )


def _hierarchical(config: RunConfig, name: str) -> Iterator[str]:
    parallel, groups = config.parallel, config.model.num_query_groups
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    sizes = parallel.hierarchical_context_parallel_sizes
    if sizes is None:
        yield "--cp-comm-type a2a+p2p needs --hierarchical-context-parallel-sizes: ranks of a2a, then ranks of the ring"
    elif len(sizes) != 2 or sizes[0] * sizes[1] != cp:
        shown = " ".join(map(str, sizes))
        yield (
            f"--hierarchical-context-parallel-sizes {shown} must be two sizes that multiply to "
            f"--context-parallel-size {cp}: ranks of a2a, then ranks of the ring"
        )
    elif groups % (tp * sizes[0]):
        yield (
            f"--cp-comm-type a2a+p2p needs {name} {groups} to be a multiple of --tensor-model-parallel-size {tp} * "
            f"the first of --hierarchical-context-parallel-sizes {sizes[0]} = {tp * sizes[0]}; use --cp-comm-type p2p"
        )


def _batch(config: RunConfig, world_size: int) -> Iterator[str]:
    parallel, training = config.parallel, config.training
    if world_size % parallel.model_parallel_size:
        return
    dp = parallel.data_parallel_size(world_size)
    rows = training.micro_batch_size * dp
    if training.global_batch_size % rows:
        yield (
            f"--global-batch-size {training.global_batch_size} must be a multiple of --micro-batch-size "
            f"{training.micro_batch_size} * data-parallel size {dp} = {rows}; "
            f"nearest: {nearest_multiple(training.global_batch_size, rows)}"
        )
        return
    microbatches, pp = config.num_microbatches(world_size), parallel.pipeline_model_parallel_size
    if parallel.num_layers_per_virtual_pipeline_stage is not None and microbatches % pp:
        yield (
            f"--num-layers-per-virtual-pipeline-stage needs the micro-batches of a step, {microbatches} "
            f"(--global-batch-size {training.global_batch_size} / {rows}), to be a multiple of "
            f"--pipeline-model-parallel-size {pp}; nearest --global-batch-size: "
            f"{nearest_multiple(training.global_batch_size, rows * pp)}"
        )


CHECKS = (_world, _tensor_parallel, _pipeline, _context, _batch)
