"""Sizes and combinations that cannot run."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_longpo.arguments import parse_arguments
from megatron_longpo.config import ConfigError
from megatron_longpo.validation import nearest_multiple, validate

GOOD = (
    "--data-path x --num-layers 8 --hidden-size 512 --ffn-hidden-size 1024 --num-attention-heads 8 "
    "--group-query-attention --num-query-groups 4 --swiglu --disable-bias-linear --train-iters 10 "
)


def errors_of(words: str, world_size: int = 1) -> tuple[str, ...]:
    try:
        validate(parse_arguments((GOOD + words).split()), world_size)
    except ConfigError as error:
        return error.errors
    return ()


@pytest.mark.parametrize(
    ("words", "world_size"),
    [
        ("", 1),
        ("", 8),
        ("--tensor-model-parallel-size 4 --sequence-parallel", 8),
        ("--context-parallel-size 2 --cp-comm-type a2a --tensor-model-parallel-size 2", 4),
        ("--context-parallel-size 8 --tensor-model-parallel-size 2", 16),
        ("--context-parallel-size 8 --cp-comm-type p2p --window-size 63,0", 8),
        ("--context-parallel-size 8 --cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 4 2", 8),
        ("--pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 1", 4),
        ("--recompute-granularity full --recompute-method uniform --recompute-num-layers 1", 1),
        ("--lr-decay-style WSD --lr-wsd-decay-iters 2", 1),
        ("--weight-decay-incr-style linear --start-weight-decay 0.01 --end-weight-decay 0.1", 1),
        ("--kv-channels 96 --hidden-size 516", 1),
        ("--seq-length 262144 --max-position-embeddings 262144", 1),
        ("--split 100,0", 1),
    ],
)
def test_good_configurations_pass(words: str, world_size: int) -> None:
    assert errors_of(words, world_size) == ()


@pytest.mark.parametrize(
    ("words", "world_size", "message"),
    [
        (
            "--context-parallel-size 4 --tensor-model-parallel-size 4 --sequence-parallel --seq-length 131071",
            16,
            "--seq-length 131071 must be a multiple of 2*cp*tp = 32; nearest: 131072",
        ),
        (
            "--context-parallel-size 4 --seq-length 131065",
            4,
            "--seq-length 131065 must be a multiple of 2*cp = 8; nearest: 131064",
        ),
        (
            "--tensor-model-parallel-size 2 --sequence-parallel --seq-length 33",
            2,
            "--seq-length 33 must be a multiple of tp = 2; nearest: 34",
        ),
        ("--seq-length 131073", 1, "give --max-position-embeddings 131073"),
        ("--tensor-model-parallel-size 2", 3, "the number of ranks 3 must be a multiple of"),
        (
            "--num-attention-heads 12 --num-query-groups 12 --kv-channels 64 --tensor-model-parallel-size 8",
            8,
            "--num-attention-heads 12 must be a multiple of --tensor-model-parallel-size 8",
        ),
        (
            "--tensor-model-parallel-size 8",
            8,
            "--num-query-groups 4 must be a multiple of --tensor-model-parallel-size 8: every rank holds whole "
            "key/value heads; largest that fits: 4",
        ),
        (
            "--tensor-model-parallel-size 4 --ffn-hidden-size 1022",
            4,
            "--ffn-hidden-size 1022 must be a multiple of --tensor-model-parallel-size 4; nearest: 1024",
        ),
        ("--num-query-groups 3", 1, "--num-attention-heads 8 must be a multiple of --num-query-groups 3"),
        ("--hidden-size 513", 1, "--hidden-size 513 must be a multiple of --num-attention-heads 8"),
        ("--kv-channels 63", 1, "--kv-channels 63 must be even"),
        (
            "--context-parallel-size 4 --cp-comm-type a2a --tensor-model-parallel-size 2",
            8,
            "--cp-comm-type a2a needs --num-query-groups 4 to be a multiple of --tensor-model-parallel-size 2 * "
            "--context-parallel-size 4 = 8; use --cp-comm-type all_gather",
        ),
        ("--context-parallel-size 4 --cp-comm-type a2a+p2p", 4, "needs --hierarchical-context-parallel-sizes"),
        (
            "--context-parallel-size 8 --cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 2 2",
            8,
            "--hierarchical-context-parallel-sizes 2 2 must be two sizes that multiply to --context-parallel-size 8",
        ),
        (
            "--context-parallel-size 4 --cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 2 2 "
            "--tensor-model-parallel-size 4",
            16,
            "a2a+p2p needs --num-query-groups 4 to be a multiple of --tensor-model-parallel-size 4 * the first of "
            "--hierarchical-context-parallel-sizes 2 = 8; use --cp-comm-type p2p",
        ),
        (
            "--pipeline-model-parallel-size 3",
            3,
            "--num-layers 8 must be a multiple of --pipeline-model-parallel-size 3; largest that fits: 2",
        ),
        (
            "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 3",
            2,
            "--num-layers-per-virtual-pipeline-stage 3 must divide the 4 layers of a pipeline stage",
        ),
        (
            "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 4",
            2,
            "--num-layers-per-virtual-pipeline-stage 4 has no effect",
        ),
        (
            "--pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 1 --global-batch-size 6",
            4,
            "to be a multiple of --pipeline-model-parallel-size 4; nearest --global-batch-size: 8",
        ),
        (
            "--global-batch-size 8 --micro-batch-size 3",
            2,
            "--global-batch-size 8 must be a multiple of --micro-batch-size 3 * data-parallel size 2 = 6; nearest: 6",
        ),
        ("--split 98", 1, "--split '98' must be the shares of documents to train on and to hold out"),
        ("--split 0,2", 1, "--split '0,2' must be the shares"),
        ("--split 969,30,1", 1, "--split '969,30,1' must be the shares"),
        ("--split a,b", 1, "--split 'a,b' must be the shares"),
        ("--recompute-granularity full --recompute-num-layers 1", 1, "full needs --recompute-method uniform or block"),
        ("--recompute-granularity full --recompute-method block", 1, "full needs --recompute-num-layers"),
        (
            "--recompute-granularity full --recompute-method block --recompute-num-layers 9",
            1,
            "--recompute-num-layers 9 must be at most the 8 layers",
        ),
        ("--fp8-format hybrid", 1, "--fp8-format hybrid needs --bf16"),
        ("--use-cpu --transformer-impl transformer_engine", 1, "--transformer-impl transformer_engine needs a GPU"),
        (
            "--use-cpu --bf16 --attention-backend fused",
            1,
            "--attention-backend fused needs a GPU: remove it or --use-cpu",
        ),
        ("--use-cpu --distributed-backend nccl", 1, "--distributed-backend nccl needs GPUs"),
        (
            "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1 --bf16 "
            "--recompute-keep-attention --fp8-format hybrid --transformer-impl transformer_engine",
            1,
            "--recompute-keep-attention does not know fp8 recomputation",
        ),
        (
            "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1 --bf16 "
            "--cpu-offloading-num-layers 2 --fp8-format hybrid --transformer-impl transformer_engine",
            1,
            "--cpu-offloading-num-layers 2 with --recompute-granularity full does not know fp8 recomputation",
        ),
        (
            "--recompute-granularity full --recompute-method uniform --recompute-num-layers 3 --bf16 "
            "--fp8-format hybrid --transformer-impl transformer_engine",
            1,
            "--recompute-num-layers 3 must divide the 8 layers of a pipeline stage with --recompute-method uniform and "
            "--fp8-format hybrid; largest that fits: 2",
        ),
        ("--cpu-offloading-num-layers 9", 1, "--cpu-offloading-num-layers 9 must be at most the 8 layers"),
        (
            "--mlp-chunk-tokens 8 --bf16 --fp8-format hybrid --transformer-impl transformer_engine",
            1,
            "--mlp-chunk-tokens 8 does not know fp8 recomputation",
        ),
        (
            "--projection-chunk-tokens 8 --bf16 --fp8-format hybrid --transformer-impl transformer_engine",
            1,
            "--projection-chunk-tokens 8 does not know fp8's scaling factors",
        ),
        (
            "--mlp-chunk-tokens 8 --recompute-granularity selective --recompute-modules core_attn mlp",
            1,
            "--mlp-chunk-tokens 8 recomputes norm and MLP already: take mlp out of --recompute-modules",
        ),
        ("--profile", 1, "--profile-step-start 10 must be less than --train-iters 10: nothing would be profiled"),
        ("--profile --profile-step-start 5 --profile-step-end 5", 1, "--profile-step-end 5 must be greater than"),
        ("--profile --profile-step-start 1 --profile-ranks 0 2 3", 2, "--profile-ranks 2 3 must be less than the"),
        ("--profile --profile-step-start 1 --use-cpu --no-use-pytorch-profiler", 1, "Nsight Systems and needs a GPU"),
        (
            "--use-distributed-optimizer --bf16 --use-cpu --optimizer-cpu-offload",
            1,
            "--optimizer-cpu-offload needs a GPU",
        ),
        ("--use-distributed-optimizer --optimizer-cpu-offload", 1, "--optimizer-cpu-offload needs --bf16"),
        (
            "--use-distributed-optimizer --bf16 --optimizer-cpu-offload --optimizer-offload-fraction 1.5",
            1,
            "--optimizer-offload-fraction 1.5 must be at most 1",
        ),
        (
            "--save s --save-interval 10 --save-retain-interval 25",
            1,
            "--save-retain-interval 25 must be a multiple of --save-interval 10; nearest: 30",
        ),
        ("--save s --load ./s --finetune", 1, "start from as --pretrained-checkpoint, which counts until --load holds"),
        ("--min-lr 1e-6", 1, "--min-lr 1e-06 must be at most --lr 5e-07"),
        ("--lr-warmup-init 1e-6", 1, "--lr-warmup-init 1e-06 must be at most --lr 5e-07"),
        ("--lr-warmup-iters 10", 1, "--lr-warmup-iters 10 must be less than the decay's 10"),
        ("--lr-decay-style WSD", 1, "--lr-decay-style WSD needs --lr-wsd-decay-iters or --lr-wsd-decay-samples"),
        ("--weight-decay-incr-style linear", 1, "linear needs --start-weight-decay and --end-weight-decay"),
        (
            "--weight-decay-incr-style linear --start-weight-decay 1 --end-weight-decay 0",
            1,
            "--end-weight-decay 0 must be at least --start-weight-decay 1",
        ),
        (
            "--optimizer sgd --use-distributed-optimizer",
            1,
            "--use-distributed-optimizer needs --optimizer adam, not sgd",
        ),
        (
            "--use-rope-scaling --rope-low-freq-factor 4",
            1,
            "--rope-low-freq-factor 4 must be less than --rope-high-freq-factor 4",
        ),
        (
            "--position-embedding-type yarn --yarn-beta-slow 64",
            1,
            "--yarn-beta-slow 64 must be less than --yarn-beta-fast 32",
        ),
    ],
)
def test_a_configuration_that_cannot_run_is_an_error_with_the_fix(words: str, world_size: int, message: str) -> None:
    errors = errors_of(words, world_size)
    assert len(errors) == 1, errors
    assert message in errors[0]


def test_everything_that_is_missing_is_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        validate(parse_arguments([]), 1)
    assert [line.split()[0] for line in caught.value.errors] == [
        "--num-layers",
        "--hidden-size",
        "--num-attention-heads",
        "--data-path",
    ]


def test_families_without_gated_mlp_are_refused() -> None:
    words = GOOD.replace("--swiglu ", "").replace("--disable-bias-linear ", "")
    with pytest.raises(ConfigError) as caught:
        validate(parse_arguments(words.split()), 1)
    assert [line.split()[0] for line in caught.value.errors] == ["--swiglu", "--disable-bias-linear"]


def test_a_run_of_less_than_a_step_is_refused() -> None:
    words = GOOD.replace("--train-iters 10", "--train-samples 7")
    with pytest.raises(ConfigError, match="--train-samples 7 is less than one step; at least --global-batch-size 8"):
        validate(parse_arguments(words.split()), 1)


def test_values_set_in_code_are_checked_too() -> None:
    config = parse_arguments(GOOD.split())
    config = dataclasses.replace(config, objective=dataclasses.replace(config.objective, beta=-1.0, turns="all"))
    with pytest.raises(ConfigError) as caught:
        validate(config, 1)
    assert caught.value.errors == (
        "--beta -1.0 must be greater than 0",
        "--turns all must be joint or independent",
    )


def test_the_nearest_multiple_is_at_least_one_multiple() -> None:
    assert [nearest_multiple(value, 8) for value in (1, 8, 11, 12, 13)] == [8, 8, 8, 16, 16]
