"""How a run trains: recomputation and offloading, number formats, the optimizer and its schedule, profiles."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_longpo.config import RunConfig
from megatron_longpo.config.field import AUTO
from megatron_longpo.config.training import FLASH
from megatron_longpo.validation.multiples import largest_divisor, nearest_multiple


def _training(config: RunConfig, world_size: int) -> Iterator[str]:
    training, parallel = config.training, config.parallel
    local = config.layers_per_chunk
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
    yield from _chunks(config)
    if training.fp8_format is not None and training.recompute_granularity == "full":
        yield from _fp8_recomputation(config, local)
    if training.fp8_format is not None and not training.bf16:
        yield f"--fp8-format {training.fp8_format} needs --bf16"
    if training.use_cpu and training.attention_backend not in (AUTO, FLASH):
        yield f"--attention-backend {training.attention_backend} needs a GPU: remove it or --use-cpu"
    if training.use_cpu and training.transformer_impl == "transformer_engine":
        yield "--transformer-impl transformer_engine needs a GPU: remove it or --use-cpu"
    if training.use_cpu and parallel.distributed_backend == "nccl":
        yield "--distributed-backend nccl needs GPUs: remove it or --use-cpu"


def _fp8_recomputation(config: RunConfig, local: int) -> Iterator[str]:
    """What Megatron's own loop of recomputed layers, the only one that knows fp8, cannot do.

    Args:
        config: The run.
        local: Layers of a pipeline stage, or of a virtual one.
    """
    training = config.training
    if training.recompute_keep_attention:
        yield "--recompute-keep-attention does not know fp8 recomputation: leave it or --fp8-format out"
    if training.cpu_offloading_num_layers:
        yield (
            f"--cpu-offloading-num-layers {training.cpu_offloading_num_layers} with --recompute-granularity full does "
            "not know fp8 recomputation: leave one of the two or --fp8-format out"
        )
    group = training.recompute_num_layers
    if training.recompute_method == "uniform" and group and group <= local and local % group:
        yield (
            f"--recompute-num-layers {group} must divide the {local} layers of a pipeline stage with "
            f"--recompute-method uniform and --fp8-format {training.fp8_format}; largest that fits: "
            f"{largest_divisor(local, group)}"
        )


def _chunks(config: RunConfig) -> Iterator[str]:
    training, mlp = config.training, config.training.mlp_chunk_tokens
    if training.fp8_format is not None:
        if mlp is not None:
            yield f"--mlp-chunk-tokens {mlp} does not know fp8 recomputation: leave it or --fp8-format out"
        if training.projection_chunk_tokens is not None:
            yield (
                f"--projection-chunk-tokens {training.projection_chunk_tokens} does not know fp8's scaling factors: "
                "leave it or --fp8-format out"
            )
    if mlp is not None and training.recompute_granularity == "selective" and "mlp" in training.recompute_modules:
        yield f"--mlp-chunk-tokens {mlp} recomputes norm and MLP already: take mlp out of --recompute-modules"


def _optimizer(config: RunConfig, world_size: int) -> Iterator[str]:
    optimizer = config.optimizer
    if optimizer.optimizer_offload_fraction > 1:
        yield f"--optimizer-offload-fraction {optimizer.optimizer_offload_fraction:g} must be at most 1"
    if optimizer.optimizer_cpu_offload and config.training.use_cpu:
        yield "--optimizer-cpu-offload needs a GPU: remove it or --use-cpu"
    if optimizer.optimizer_cpu_offload and not config.training.bf16:
        # Megatron's hybrid optimizer neither updates nor stores the host's copies of fp32 weights when it is loaded.
        yield "--optimizer-cpu-offload needs --bf16"
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


def _checkpoints(config: RunConfig, world_size: int) -> Iterator[str]:
    settings = config.checkpoint
    interval, kept = settings.save_interval, settings.save_retain_interval
    if interval is not None and kept is not None and kept % interval:
        yield (
            f"--save-retain-interval {kept} must be a multiple of --save-interval {interval}; nearest: "
            f"{nearest_multiple(kept, interval)}"
        )
    if settings.finetune and settings.load_equals_save:
        yield (
            f"--finetune with --load equal to --save {settings.save} would begin at step 0 again whenever the command "
            "is started again, and replace what it saved: leave --finetune out and give the weights to start from as "
            "--pretrained-checkpoint, which counts until --load holds a checkpoint"
        )


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


CHECKS = (_training, _optimizer, _checkpoints, _profile)
