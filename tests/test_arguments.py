"""The command line: every flag, its precedence over YAML, its help, and its errors."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from megatron_longpo.arguments import HelpRequested, parse_arguments, parse_command_line
from megatron_longpo.config import ConfigError, RunConfig
from megatron_longpo.config.flags import FLAGS, GROUPS, FlagSpec
from megatron_longpo.config.help import default_text, flag_lines, help_text
from megatron_longpo.config.not_offered import NOT_OFFERED

MEGATRON_FLAGS = """
--tensor-model-parallel-size --pipeline-model-parallel-size --num-layers-per-virtual-pipeline-stage
--context-parallel-size --cp-comm-type --sequence-parallel --micro-batch-size --global-batch-size --seq-length
--train-iters --train-samples --num-layers --hidden-size --ffn-hidden-size --num-attention-heads --kv-channels
--max-position-embeddings --position-embedding-type --group-query-attention --num-query-groups --swiglu --normalization
--norm-epsilon --rotary-base --use-rope-scaling --rope-scaling-factor --untie-embeddings-and-output-weights
--disable-bias-linear --add-qkv-bias --qk-layernorm --vocab-size --make-vocab-size-divisible-by --init-method-std
--attention-dropout --hidden-dropout --tokenizer-type --tokenizer-model --data-path --split --num-workers --lr --min-lr
--lr-decay-style --lr-decay-iters --lr-decay-samples --lr-warmup-fraction --lr-warmup-iters --lr-warmup-samples
--weight-decay --start-weight-decay --end-weight-decay --weight-decay-incr-style --optimizer --adam-beta1 --adam-beta2
--adam-eps --clip-grad --bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
--distributed-backend --distributed-timeout-minutes --recompute-granularity --recompute-method --recompute-num-layers
--recompute-modules --save --load --pretrained-checkpoint --save-interval --async-save --ckpt-format
--save-retain-interval --no-load-optim --no-load-rng --no-save-optim --no-save-rng --finetune
--use-checkpoint-args --log-interval --eval-interval --eval-iters
--tensorboard-dir --wandb-project --wandb-entity --wandb-exp-name --wandb-save-dir --skip-train --exit-interval
--exit-duration-in-mins --exit-signal-handler --seed --transformer-impl --fp8-format --fp8-recipe --profile
--profile-step-start
--profile-step-end --profile-ranks --cpu-offloading-num-layers --hierarchical-context-parallel-sizes
--optimizer-cpu-offload --optimizer-offload-fraction --overlap-cpu-optimizer-d2h-h2d
"""

OUR_FLAGS = """
--objective --beta --lambda --nll-weight --turns --turn-reduction --reference-rotary-base --reference-dir
--metrics-jsonl --logits-chunk-tokens --max-skipped-steps --load-hf --use-cpu --train-epochs --chat-template
--recompute-keep-attention --profile-dir --mlp-chunk-tokens --projection-chunk-tokens
"""


def parse(line: str) -> RunConfig:
    return parse_arguments(line.split())


ALL = pytest.mark.parametrize("spec", FLAGS.values(), ids=FLAGS.keys())


@pytest.mark.parametrize("flag", (MEGATRON_FLAGS + OUR_FLAGS).split())
def test_the_flag_exists(flag: str) -> None:
    assert flag in {spec.flag for spec in FLAGS.values()}


def test_defaults_are_the_papers() -> None:
    config = parse_arguments([])
    assert config == RunConfig()
    assert (config.objective.objective, config.objective.beta, config.objective.preference_weight) == (
        "longpo",
        0.1,
        0.01,
    )
    assert (config.optimizer.optimizer, config.optimizer.lr, config.training.global_batch_size) == ("adam", 5e-7, 8)
    assert (config.optimizer.lr_decay_style, config.optimizer.lr_warmup_fraction) == ("cosine", 0.1)
    assert config.explicit == frozenset()


def test_values_have_their_types() -> None:
    config = parse(
        "--lr 3e-7 --train-iters 10 --bf16 --lambda=0.5 --recompute-granularity selective --recompute-modules "
        "core_attn mlp --exit-duration-in-mins 0.5 --seq-length 131_072"
    )
    assert config.optimizer.lr == 3e-7
    assert config.training.train_iters == 10
    assert config.training.bf16 is True
    assert config.objective.preference_weight == 0.5
    assert config.training.recompute_modules == ("core_attn", "mlp")
    assert config.training.exit_duration_in_mins == 0.5
    assert config.data.seq_length == 131072
    assert {"lambda", "bf16", "recompute_modules"} < config.explicit


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("lr: 1e-6\nseed: 7\nbf16: true\nno-load-optim: true\nload: folder\n")
    config = parse_arguments(["--config", str(path), "--lr", "2e-6", "--no-bf16", "--load-optim"])
    assert (config.optimizer.lr, config.training.seed, config.training.bf16) == (2e-6, 7, False)
    assert config.checkpoint.no_load_optim is False
    assert config.optimizer.clip_grad == 1.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lrr 1", "--lrr is not a flag; did you mean --lr?"),
        ("--num_layers=2", "--num_layers is not a flag; did you mean --num-layers?"),
        ("--preference-weight 1", "--preference-weight is not a flag; did you mean --lambda?"),
        ("--context-parallel 2", "--context-parallel is not a flag; did you mean --context-parallel-size?"),
        ("--qqqqq 2", "--qqqqq is not a flag; --help GROUP lists those of a group: objective, data,"),
        ("--fp16", "--fp16 is not offered: use --bf16"),
        ("--manual_gc-interval=5", "--manual_gc-interval is not offered: Python's garbage collector"),
        ("stray", "'stray' stands alone: flags begin with --"),
        ("--lr", "--lr: expected one argument"),
        ("--lr fast", "--lr 'fast' must be a finite number"),
        ("--lr inf", "--lr 'inf' must be a finite number"),
        ("--lr -1", "--lr -1.0 must be greater than 0"),
        (
            "--position-embedding-type yarn --yarn-mscale 0.7 --yarn-mscale-all-dim 0",
            "--yarn-mscale-all-dim 0.0 must be greater than 0",
        ),
        ("--num-layers 0", "--num-layers 0 must be at least 1 layers"),
        (f"--seed {2**63}", f"--seed {2**63} must be at most {2**63 - 1}, the largest number that torch takes"),
        ("--profile --profile-ranks 0 x", "--profile-ranks 'x' must be a whole number"),
        ("--profile --profile-ranks -1", "--profile-ranks -1 must be at least 0"),
        ("--adam-beta1 1", "--adam-beta1 1.0 must be less than 1"),
        ("--train-iters 1.5", "--train-iters '1.5' must be a whole number"),
        ("--objective ppo", "--objective ppo must be longpo or dpo or sft-chosen"),
        ("--normalization LayerNorm", "--normalization LayerNorm must be RMSNorm (the supported families"),
        ("--hidden-dropout 0.1", "--hidden-dropout 0.1 must be 0.0 (the shared-prefix row has no dropout)"),
        ("--ckpt-format torch", "--ckpt-format torch must be torch_dist"),
    ],
)
def test_a_bad_word_is_an_error_that_names_it(words: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(words)
    assert message in str(caught.value)


def test_all_errors_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse("--lrr 1 --seed x --turns y")
    assert len(caught.value.errors) == 3


def test_flags_that_are_not_offered_are_not_flags() -> None:
    assert not set(NOT_OFFERED) & {spec.flag for spec in FLAGS.values()}
    for advice in NOT_OFFERED.values():
        assert set(re.findall(r"--[a-z0-9-]+", advice)) <= {spec.flag for spec in FLAGS.values()}


@pytest.mark.parametrize(
    ("words", "flag", "used"),
    [
        ("--objective sft-chosen --beta 0.2", "--beta 0.2", "--objective longpo|dpo|sft-chosen-constraint"),
        ("--objective sft-rejected --lambda 1", "--lambda 1", "with --objective longpo|dpo"),
        ("--objective sft-chosen --turn-reduction mean", "--turn-reduction mean", "with --objective longpo|dpo"),
        (
            "--objective dpo --reference-rotary-base 1e4",
            "--reference-rotary-base 10000",
            "longpo|sft-chosen-constraint",
        ),
        ("--objective sft-chosen --reference-dir x", "--reference-dir x", "with --objective"),
        ("--cp-comm-type a2a", "--cp-comm-type a2a", "with --context-parallel-size > 1"),
        (
            "--context-parallel-size 4 --hierarchical-context-parallel-sizes 2 2",
            "--hierarchical-context-parallel-sizes 2 2",
            "with --cp-comm-type a2a+p2p",
        ),
        ("--sequence-parallel", "--sequence-parallel", "with --tensor-model-parallel-size > 1"),
        ("--num-layers-per-virtual-pipeline-stage 1", "--num-layers-per", "with --pipeline-model-parallel-size > 1"),
        (
            "--overlap-param-gather",
            "--overlap-param-gather",
            "with --use-distributed-optimizer and with --overlap-grad",
        ),
        ("--lr-decay-style constant --min-lr 1e-8", "--min-lr 1e-08", "with --lr-decay-style cosine|linear|WSD"),
        ("--lr-warmup-iters 5 --lr-warmup-fraction 0.2", "--lr-warmup-fraction 0.2", "without --lr-warmup-iters"),
        ("--train-iters 5 --train-epochs 2", "--train-epochs 2", "without --train-iters or --train-samples"),
        ("--optimizer sgd --adam-beta1 0.8", "--adam-beta1 0.8", "with --optimizer adam"),
        ("--optimizer-cpu-offload", "--optimizer-cpu-offload", "with --use-distributed-optimizer"),
        ("--optimizer-offload-fraction 0.5", "--optimizer-offload-fraction 0.5", "with --optimizer-cpu-offload"),
        ("--sgd-momentum 0.8", "--sgd-momentum 0.8", "with --optimizer sgd"),
        ("--recompute-granularity selective --recompute-method block", "--recompute-method", "-granularity full"),
        ("--recompute-num-layers 1", "--recompute-num-layers 1", "with --recompute-granularity full"),
        ("--recompute-keep-attention", "--recompute-keep-attention", "with --recompute-granularity full"),
        ("--recompute-modules mlp", "--recompute-modules mlp", "with --recompute-granularity selective"),
        ("--transformer-impl local --fp8-format e4m3", "--fp8-format e4m3", "-impl transformer_engine"),
        ("--num-query-groups 2", "--num-query-groups 2", "with --group-query-attention"),
        ("--rope-scaling-factor 4", "--rope-scaling-factor 4", "with --use-rope-scaling"),
        ("--yarn-beta-fast 4", "--yarn-beta-fast 4", "with --position-embedding-type yarn"),
        (
            "--position-embedding-type yarn --use-rope-scaling",
            "--use-rope-scaling",
            "with --position-embedding-type rope",
        ),
        ("--position-embedding-type yarn --yarn-mscale 1", "--yarn-mscale 1", "with --yarn-mscale-all-dim"),
        ("--profile-ranks 0 1", "--profile-ranks 0 1", "with --profile"),
        ("--no-load-optim", "--no-load-optim", "with --load"),
        ("--finetune", "--finetune", "with --load"),
        ("--no-save-rng", "--no-save-rng", "with --save"),
        ("--async-save", "--async-save", "with --save"),
        ("--save-interval 5", "--save-interval 5", "with --save"),
        ("--use-checkpoint-args", "--use-checkpoint-args", "with --load or --pretrained-checkpoint"),
        ("--load-hf x --init-method-std 0.1", "--init-method-std 0.1", "without --load-hf or --pretrained-checkpoint"),
        ("--wandb-entity x", "--wandb-entity x", "with --wandb-project"),
        ("--chat-template x", "--chat-template x", "with --tokenizer-model"),
        ("--split 100,0 --eval-iters 5", "--eval-iters 5", "with a held-out share in --split"),
        ("--eval-iters 0 --skip-train", "--skip-train", "with --eval-iters > 0"),
        ("--eval-iters 0 --eval-interval 5", "--eval-interval 5", "with --eval-iters > 0"),
    ],
)
def test_a_flag_without_effect_is_an_error(words: str, flag: str, used: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(words)
    (line,) = caught.value.errors
    assert line.startswith(f"{flag}")
    assert " has no effect with" in line
    assert used in line.partition("it is used only ")[2]


@ALL
def test_every_condition_is_tested_above_or_holds_by_default(spec: FlagSpec) -> None:
    values = RunConfig().to_flat_dict()
    for need in spec.info.needs:
        assert isinstance(need.holds(values), bool)
        assert need.text.startswith(("with ", "without "))
        assert all("--" + key.replace("_", "-") in need.text for key in need.keys)


def test_a_flag_without_effect_in_a_file_is_an_error_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("beta: 0.2\nsequence-parallel: false\nmin-lr: 0\n")
    with pytest.raises(ConfigError) as caught:
        parse_arguments(["--config", str(path), "--objective", "sft-chosen"])
    (line,) = caught.value.errors
    assert line.startswith(f"{path}:1: beta 0.2 has no effect with --objective sft-chosen")


def test_a_model_flag_may_get_its_effect_from_a_checkpoint() -> None:
    config = parse_arguments(["--load-hf", "folder", "--num-query-groups", "2", "--rope-scaling-factor", "4"])
    assert config.awaits_model
    config = parse("--load folder --use-checkpoint-args --num-query-groups 2")
    assert config.awaits_model
    with pytest.raises(ConfigError):
        parse("--load folder --num-query-groups 2")


@ALL
@pytest.mark.parametrize("width", [80, 120])
def test_the_help_of_a_flag_has_its_default_conditions_and_source(spec: FlagSpec, width: int) -> None:
    lines = flag_lines(spec, width)
    text = " ".join(" ".join(lines).split())
    default = default_text(spec)
    assert (default if default.startswith("required") else f"[default: {default}") in text
    if spec.info.default_text is None and spec.kind not in (bool, tuple):
        assert spec.kind(default) == spec.default
    assert spec.flag in text
    assert all(need.text in text for need in spec.info.needs)
    assert spec.info.source is None or spec.info.source in text
    assert spec.info.unit is None or spec.info.choices or spec.info.unit.upper() in lines[0]
    assert max(map(len, lines)) <= width


def test_the_help_page_has_every_flag_once_by_group() -> None:
    page = help_text(width=100)
    for spec in FLAGS.values():
        assert len(re.findall(rf"^  {spec.flag}(?: |$)", page, re.MULTILINE)) == 1, spec.flag
    headings = re.findall(r"^([a-z]+): ", page, re.MULTILINE)
    assert headings == list(GROUPS)


def test_help_can_be_narrowed() -> None:
    assert "--adam-eps" in help_text("optimizer") and "--num-layers" not in help_text("optimizer")
    assert "--lr-warmup-iters" in help_text("--lr-warmup") and "--min-lr" not in help_text("--lr-warmup")
    with pytest.raises(ConfigError, match="did you mean optimizer"):
        help_text("optimiser")
    with pytest.raises(HelpRequested):
        parse_arguments(["--help", "--lr", "1"])


def test_the_script_prints_help_and_errors_from_one_rank(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as left:
        parse_command_line(["--help"])
    assert left.value.code == 0
    assert "--lambda" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        parse_command_line(["--lrr", "1"])
    assert left.value.code == 2
    assert "error: --lrr is not a flag" in capsys.readouterr().err
    # Another rank waits to be ended by torchrun, and speaks only if it was not.
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setattr("os._exit", sys.exit)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as left:
        parse_command_line(["--lrr", "1"])
    assert left.value.code == 2 and waited == [15.0]
