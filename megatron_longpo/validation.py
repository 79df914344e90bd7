"""Sizes and combinations that cannot run, found before anything is built: all of them at once, each with its fix."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_longpo.config import ConfigError, RunConfig
from megatron_longpo.config.data import split_shares
from megatron_longpo.config.flags import FLAGS


def validate(config: RunConfig, world_size: int) -> None:
    """Raise where a configuration cannot run on this many ranks.

    Args:
        config: With its model (`RunConfig.with_model`) if a checkpoint gives it.
        world_size: Number of ranks.

    Raises:
        ConfigError: One line for every mistake.
    """
    errors = list(_ranges(config))
    # Divisions below assume sizes of at least 1.
    if not errors:
        sizes = (_model, _data, _world, _tensor_parallel, _pipeline, _context, _batch)
        for check in (*sizes, _training, _optimizer, _profile):
            errors += check(config, world_size)
    if errors:
        raise ConfigError(*errors)


def nearest_multiple(value: int, multiple: int) -> int:
    """The multiple nearest to a value, at least one; the greater of two that are as near."""
    return max((value + multiple // 2) // multiple, 1) * multiple


def _ranges(config: RunConfig) -> Iterator[str]:
    for key, value in config.to_flat_dict().items():
        try:
            FLAGS[key].convert(value)
        except ValueError as error:
            yield f"{FLAGS[key].flag} {error}"


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
    if config.parallel.sequence_parallel and tp == 1:
        yield "--sequence-parallel needs --tensor-model-parallel-size > 1"
    if heads % tp:
        yield f"--num-attention-heads {heads} must be a multiple of --tensor-model-parallel-size {tp}"
    if groups and groups != heads and groups % tp:
        yield (
            f"--num-query-groups {groups} must be a multiple of --tensor-model-parallel-size {tp}: every rank holds "
            f"whole key/value heads; largest that fits: {_largest_divisor(groups, tp)}"
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
            f"largest that fits: {_largest_divisor(layers, pp)}"
        )
    elif virtual is not None and pp == 1:
        yield "--num-layers-per-virtual-pipeline-stage needs --pipeline-model-parallel-size > 1"
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
    if cp > 1 and parallel.cp_comm_type == "a2a+p2p":
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


def _training(config: RunConfig, world_size: int) -> Iterator[str]:
    training, parallel = config.training, config.parallel
    local = config.model.num_layers // parallel.pipeline_model_parallel_size
    local = parallel.num_layers_per_virtual_pipeline_stage or local
    if training.train_samples is not None and training.train_samples < training.global_batch_size:
        yield (
            f"--train-samples {training.train_samples} is less than one step; at least --global-batch-size "
            f"{training.global_batch_size}"
        )
    if training.recompute_granularity == "full":
        if training.recompute_method is None:
            yield "--recompute-granularity full needs --recompute-method uniform or block"
        if training.recompute_num_layers is None:
            yield "--recompute-granularity full needs --recompute-num-layers; 1 saves most memory with uniform"
        elif config.model.num_layers and training.recompute_num_layers > local:
            yield (
                f"--recompute-num-layers {training.recompute_num_layers} must be at most the {local} layers of a "
                f"pipeline stage"
            )
    if config.model.num_layers and training.cpu_offloading_num_layers > local:
        yield (
            f"--cpu-offloading-num-layers {training.cpu_offloading_num_layers} must be at most the {local} layers of a "
            "pipeline stage"
        )
    if training.mlp_chunk_tokens is not None:
        yield from _mlp_chunks(config)
    if training.recompute_keep_attention and training.fp8_format is not None:
        yield "--recompute-keep-attention does not know fp8 recomputation: leave it or --fp8-format out"
    if "layernorm" in training.recompute_modules and training.transformer_impl == "local":
        yield "--recompute-modules layernorm needs --transformer-impl transformer_engine"
    if training.fp8_format is not None and not training.bf16:
        yield f"--fp8-format {training.fp8_format} needs --bf16"
    if training.use_cpu and training.transformer_impl == "transformer_engine":
        yield "--transformer-impl transformer_engine needs a GPU: remove it or --use-cpu"
    if training.use_cpu and parallel.distributed_backend == "nccl":
        yield "--distributed-backend nccl needs GPUs: remove it or --use-cpu"


def _mlp_chunks(config: RunConfig) -> Iterator[str]:
    training, chunk = config.training, config.training.mlp_chunk_tokens
    if training.fp8_format is not None:
        yield f"--mlp-chunk-tokens {chunk} does not know fp8 recomputation: leave it or --fp8-format out"
    again = {"mlp", "layernorm"} & set(training.recompute_modules)
    if training.recompute_granularity == "selective" and again:
        yield (
            f"--mlp-chunk-tokens {chunk} recomputes norm and MLP already: take {' and '.join(sorted(again))} out of "
            "--recompute-modules"
        )


def _optimizer(config: RunConfig, world_size: int) -> Iterator[str]:
    optimizer = config.optimizer
    if optimizer.optimizer_offload_fraction > 1:
        yield f"--optimizer-offload-fraction {optimizer.optimizer_offload_fraction:g} must be at most 1"
    if optimizer.optimizer_cpu_offload and config.training.use_cpu:
        yield "--optimizer-cpu-offload needs a GPU: remove it or --use-cpu"
    if optimizer.min_lr > optimizer.lr:
        yield f"--min-lr {optimizer.min_lr:g} must be at most --lr {optimizer.lr:g}"
    if optimizer.lr_warmup_init > optimizer.lr:
        yield f"--lr-warmup-init {optimizer.lr_warmup_init:g} must be at most --lr {optimizer.lr:g}"
    if optimizer.lr_decay_style == "WSD" and not (optimizer.lr_wsd_decay_iters or optimizer.lr_wsd_decay_samples):
        yield "--lr-decay-style WSD needs --lr-wsd-decay-iters or --lr-wsd-decay-samples"
    for unit in ("iters", "samples"):
        warmup, decay = getattr(optimizer, f"lr_warmup_{unit}"), getattr(optimizer, f"lr_decay_{unit}")
        decay = decay or getattr(config.training, f"train_{unit}")
        if warmup is not None and decay is not None and warmup >= decay:
            yield f"--lr-warmup-{unit} {warmup} must be less than the decay's {decay}"
    if optimizer.weight_decay_incr_style != "constant":
        start, end = optimizer.start_weight_decay, optimizer.end_weight_decay
        if start is None or end is None:
            yield (
                f"--weight-decay-incr-style {optimizer.weight_decay_incr_style} needs --start-weight-decay and "
                f"--end-weight-decay"
            )
        elif end < start:
            yield f"--end-weight-decay {end:g} must be at least --start-weight-decay {start:g}"
    if config.parallel.use_distributed_optimizer and optimizer.optimizer != "adam":
        yield f"--use-distributed-optimizer needs --optimizer adam, not {optimizer.optimizer}"


def _profile(config: RunConfig, world_size: int) -> Iterator[str]:
    settings, steps = config.logging, config.training.train_iters
    if not settings.profile:
        return
    first, last = settings.profile_step_start, settings.profile_step_end
    if last <= first:
        yield f"--profile-step-end {last} must be greater than --profile-step-start {first}"
    if steps is not None and first >= steps:
        yield f"--profile-step-start {first} must be less than --train-iters {steps}: nothing would be profiled"
    absent = [str(rank) for rank in settings.profile_ranks if rank >= world_size]
    if absent:
        yield f"--profile-ranks {' '.join(absent)} must be less than the number of ranks {world_size}"
    if config.training.use_cpu and not settings.use_pytorch_profiler:
        yield "--no-use-pytorch-profiler is for Nsight Systems and needs a GPU: remove it or --use-cpu"


def _largest_divisor(number: int, at_most: int) -> int:
    return max(divisor for divisor in range(1, min(number, at_most) + 1) if number % divisor == 0)
