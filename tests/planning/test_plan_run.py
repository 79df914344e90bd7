"""tools/plan_run.py and ``pretrain_longpo.py --dry-run``, as a user meets them."""

from __future__ import annotations

import json
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_longpo.arguments import parse_arguments
from megatron_longpo.config import ConfigError, ParallelConfig
from megatron_longpo.planning import plan_command
from megatron_longpo.planning import search as search_module
from megatron_longpo.planning.dry_run import RankMemory
from megatron_longpo.planning.dry_run_command import print_dry_run, resolved
from megatron_longpo.planning.hardware import gpu_named
from megatron_longpo.planning.layouts import candidates
from megatron_longpo.planning.options import MEMORY_OPTIONS, MemoryOption
from megatron_longpo.planning.parts import Part
from megatron_longpo.planning.plan_command import search_of
from megatron_longpo.planning.search import Plan, find_plans
from megatron_longpo.planning.timed_layouts import Search, timed_layouts
from megatron_longpo.planning.workload import made_up_rows
from megatron_longpo.training.initial import with_initial_model
from megatron_longpo.validation import validate
from tests.planning.cases import HF_CONFIG, MODEL, WINDOW, words_of
from tests.tiny import MODEL_FLAGS, VOCAB, write_tiny_dataset
from tools import plan_run


def plan(monkeypatch: pytest.MonkeyPatch, model: Path, words: str) -> None:
    start = f"plan_run.py --hf-model {model} --seq-length 1024 --response-tokens 50 --num-plans 1 --num-documents 9 "
    monkeypatch.setattr(sys, "argv", (start + words).split())
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)  # the test process keeps its own
    plan_run.main()


def test_the_plan_ends_in_a_command_that_the_trainer_takes(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found: list[Plan] = []
    monkeypatch.setattr(plan_command, "find_plans", lambda search: found.extend(find_plans(search)) or found)
    (model / "config.json").write_text(json.dumps(HF_CONFIG | WINDOW))
    plan(monkeypatch, model, "--num-gpus 2 --gpu h100-80gb --window-size 255,0")
    shown = capsys.readouterr().out
    assert "\nnote: a token attends to the last 256 tokens of its --seq-length 1024 (--window-size 255,0)" in shown
    for text in ("tokens/s/GPU", "MFU %", "peak GiB", "attention workspace", "fits in h100-80gb", "9 documents: "):
        assert text in shown
    assert f"\nFirst download the model, `hf download NAME --local-dir {model}`: {model} holds no" in shown
    config = with_initial_model(parse_arguments(words_of("torchrun" + shown.partition("torchrun")[2])))
    validate(config, 2)
    assert config.data.seq_length == 1024 and config.training.bf16 and config.model.hidden_size == 128
    assert config.model.window_size == (255, 0) and config.reference_window_size == (127, 0)
    assert config.with_device_defaults("local", "nccl") == found[0].candidate.config


def test_every_layout_of_the_search_passes_the_trainer_s_checks() -> None:
    base = [
        "--load-hf",
        "x",
        "--data-path",
        "y",
        "--seq-length",
        "65536",
        "--max-position-embeddings",
        "65536",
        "--bf16",
    ]
    model = parse_arguments(MODEL.split()).model
    found = list(candidates(base, model, 8, 8))
    # Every option once, and every layout once; all of them take a minute.
    for one in {**{one.option: one for one in found}, **{one.config.parallel: one for one in found}}.values():
        validate(one.config, 8)
        again = parse_arguments(one.words).with_model(model).with_device_defaults("local", "nccl")
        assert again == one.config
    layouts = {one.config.parallel for one in found}
    sizes = {(p.tensor_model_parallel_size, p.pipeline_model_parallel_size, p.context_parallel_size) for p in layouts}
    assert {(1, 1, 1), (4, 1, 2), (2, 2, 2), (1, 4, 2), (1, 1, 8)} <= sizes
    assert (8, 1, 1) not in sizes  # 4 key/value heads
    assert {p.cp_comm_type for p in layouts} == {"all_gather", "a2a", "p2p", "a2a+p2p"}
    assert {p.hierarchical_context_parallel_sizes for p in layouts} == {None, (2, 2), (2, 4), (4, 2)}
    assert {p.num_layers_per_virtual_pipeline_stage for p in layouts} == {None, 1}
    assert {one.option for one in found} == set(MEMORY_OPTIONS)
    # Tensor parallelism and the inner groups of a ring are of one node: 4 GPUs of 6 would not always be.
    six = {one.config.parallel for one in candidates([*base, "--global-batch-size", "6"], model, 12, 6)}
    assert {p.tensor_model_parallel_size for p in six} == {1, 2}
    inner = {p.tensor_model_parallel_size * (p.hierarchical_context_parallel_sizes or (1,))[0] for p in six}
    assert inner == {1, 2}
    assert not list(candidates(base, model, 12, 8))
    assert {one.config.training.cpu_offloading_num_layers for one in found} == {0, 1, 2, 4}


def test_offloading_enters_where_memory_is_short_and_the_host_has_some() -> None:
    base = [
        "--load-hf",
        "x",
        "--data-path",
        "y",
        "--bf16",
        "--seq-length",
        "131072",
        "--max-position-embeddings",
        "131072",
    ]
    model = replace(parse_arguments(MODEL.split()).model, num_layers=16, hidden_size=4096, ffn_hidden_size=14336)
    model = replace(model, num_attention_heads=32, num_query_groups=8, kv_channels=128)

    def options_that_fit(mem_gib: float, host_gib: float) -> list[MemoryOption]:
        gpu = gpu_named("h100-80gb", mem_gib=mem_gib, host_gib=host_gib)
        search = Search(base, model, "x", 8, gpu, num_turns=4, response_tokens=512, num_plans=1)
        rows = made_up_rows(legal[0].config)
        return [entry.candidate.option for entry in timed_layouts(search, legal, rows) if entry.may_fit(gpu)]

    legal = list(candidates(base, model, 8, 8))
    roomy, short, tight = (options_that_fit(mem_gib, 256) for mem_gib in (200, 30, 18))
    assert (roomy[0].recomputed, roomy[0].on_host) == ("nothing", "–")
    # The host would be a little faster here, but not by a tenth.
    assert (short[0].recomputed, short[0].on_host) == ("all but attention", "–")
    assert "activations" in tight[0].on_host
    without = options_that_fit(18, 0)
    assert {option.on_host for option in without} == {"–"} and "everything" in without[0].recomputed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--num-gpus 7 --gpu h100-80gb",
            "7 has no possible layout.* possible: --num-gpus 4 .TP.*, or --num-gpus 8 .TP.*-batch-size 7 or 14 on",
        ),
        (
            # Four GPUs have layouts too, and seven have some with another batch, of which none fits.
            "--num-gpus 7 --gpu mine --peak-tflops 9 --mem-gib 3.164 --link-gbs 1",
            "7 has no possible layout.* nearest possible: --num-gpus 8 .TP 4 [^,]*$",
        ),
        (
            "--num-gpus 7 --gpu mine --peak-tflops 9 --mem-gib 3.162 --link-gbs 1",
            "7 has no possible layout.* nearest possible: --num-gpus 16 .TP 4 [^,]*$",
        ),
        pytest.param(
            "--num-gpus 7 --gpu mine --peak-tflops 9 --mem-gib 3.16 --link-gbs 1",
            "7 has no possible layout.* nearest possible: none that fits, give GPUs with more memory",
            marks=pytest.mark.slow,
        ),
        (
            "--num-gpus 1 --gpu mine --peak-tflops 9 --mem-gib 3.18 --link-gbs 1",
            r"no layout of 1 × mine fits: .* needs about 0.03 GiB per GPU and 0.02 .* possible: --num-gpus 2 .TP",
        ),
        ("--num-gpus 12 --gpu h100-80gb", "12 must be a multiple of --gpus-per-node 8, .* nearest possible: 8 or 16"),
        (
            "--num-gpus 2 --gpu a100-80gb --attention-backend flash3",
            "flash3 is not for a100-80gb: give .* flash or fused",
        ),
        ("--num-gpus 2 --gpu h100", "--gpu h100 is not known; did you mean h100-80gb"),
        ("--num-gpus 2 --gpu h100-80gb --window-size 9,0", "--window-size 9,0: LlamaForCausalLM has no window"),
        ("--num-gpus 2 --gpu h100-80gb --turns-per-document 99", "has no room for a document"),
        ("--num-gpus 2 --gpu h100-80gb --seq-length 1023", "--seq-length 1023 must be a multiple of 256 .*: 1024"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_what_can(
    words: str, message: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=message):
        plan(monkeypatch, model, words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--num-gpus 0 --gpu h100-80gb", "--num-gpus: 0 must be a whole number of at least 1"),
        ("--num-gpus 2 --gpu h100-80gb --seq-length 128K", "--seq-length: 128K must be a whole number: 131072"),
        ("--num-gpus 2 --gpu h100-80gb --link-gbs -1", "--link-gbs: '-1' must be a finite number greater than 0"),
        (
            "--num-gpus 2 --gpu h100-80gb --rotary-base 1e7x",
            "--rotary-base: '1e7x' must be a finite number of at least 0",
        ),
        ("--num-gpus 2 --gpu h100-80gb --window-size 4095", "--window-size: '4095' must be full, or the tokens before"),
        ("--num-gpus 2 --gpu h100-80gb --rotary-base 0", "--rotary-base: '0' must be greater than 1"),
        ("--num-gpus 2 --gpu h100-80gb --link-gbs 0", "--link-gbs: '0' must be a finite number greater than 0"),
    ],
)
def test_numbers_that_are_none_are_said_to_be(
    words: str, message: str, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        plan(monkeypatch, model, words)
    assert message in capsys.readouterr().err


def test_a_broken_config_is_named_by_its_own_path(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        SystemExit, match=r"--hf-model NAME/7b does not exist: .* download NAME config.json --local-dir"
    ):
        plan(monkeypatch, Path("NAME/7b"), "--num-gpus 2 --gpu h100-80gb")
    broken = model / "shape.json"
    broken.write_text("{")
    with pytest.raises(SystemExit, match=rf"{broken} is not JSON"):
        plan(monkeypatch, broken, "--num-gpus 2 --gpu h100-80gb")


def one_gpu(model: Path, words: str = "") -> Search:
    start = f"--hf-model {model} --seq-length 65536 --num-gpus 1 --response-tokens 50 --num-plans 1 --host-mem-gib 0"
    return search_of(plan_run.parser().parse_args(f"{start} --gpu h100-80gb {words}".split()))


def test_a_layout_that_fails_is_not_followed_by_those_that_hold_as_much(model: Path) -> None:
    search = one_gpu(model)
    legal = list(candidates(search.base, search.model, 1, 8))
    timed = timed_layouts(search, legal, made_up_rows(legal[0].config))
    failed, leaner = timed[0], min(timed, key=lambda entry: entry.memory.gib)
    gib = 1.1 * failed.memory.gib
    memory = RankMemory(0, {Part.WEIGHTS: round(gib * 2**30)}, {}, {})
    plan = Plan(failed.candidate, failed.time, (memory,))
    small, large = (gpu_named("h100-80gb", mem_gib=(gib * share + 3) / 0.95) for share in (0.99, 1.01))
    assert not search_module._may_fit_beside(failed, failed, plan, small)
    assert search_module._may_fit_beside(leaner, failed, plan, small)
    assert search_module._may_fit_beside(failed, failed, plan, large)
    # It says nothing of other sizes.
    other = replace(failed.candidate, config=replace(failed.candidate.config, parallel=ParallelConfig(8)))
    assert search_module._may_fit_beside(replace(failed, candidate=other), failed, plan, small)


@pytest.mark.slow
def test_where_the_fastest_were_estimated_too_low_the_leanest_is_measured(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_module, "ESTIMATE_MARGIN", 100.0)
    monkeypatch.setattr(search_module, "MAX_MEASURED", 1)
    # Without recomputation a step needs 0.8 GiB, with all of it 0.4.
    (plan,) = find_plans(one_gpu(model, f"--mem-gib {3.6 / 0.95}"))
    assert plan.candidate.option.recomputed == "everything, in pieces" and 0.2 < plan.gib < 0.6


def test_a_dry_run_prints_the_memory_of_exactly_the_given_flags(
    model: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    flags = [*MODEL_FLAGS, "--seq-length=4096", "--bf16", "--dry-run", "--num-gpus=4", "--context-parallel-size=2"]
    flags.insert(0, "--use-distributed-optimizer")
    print_dry_run(parse_arguments(flags))
    made_up = capsys.readouterr().out
    assert "4 GPUs: TP 1 · PP 1 · CP 2 all_gather · DP 2, sharded optimizer" in made_up
    assert "as long as --seq-length allows" in made_up and "total" in made_up
    data = write_tiny_dataset(model / "data")
    print_dry_run(parse_arguments([*flags, f"--data-path={data}", "--gpu=h100-80gb"]))
    real = capsys.readouterr().out
    assert "own peak" in real and "host memory" not in real
    assert re.search(r"predicted: \d.* s per step of 8 documents, .* s/document, .* tokens/s/GPU, MFU \d", real)
    assert "predicted" not in made_up
    known = ("is deprecated. Please use `torch.distributed", "CUDA_DEVICE_MAX_CONNECTIONS")
    assert not [warning for warning in recwarn if any(text in str(warning.message) for text in known)]
    assert "the dataset's longest, tiny-" in real and "fits in h100-80gb" in real
    with pytest.raises(ConfigError, match="--num-query-groups 2 must be a multiple of --tensor-model-parallel-size 4"):
        print_dry_run(parse_arguments([*flags[:-1], "--tensor-model-parallel-size=4"]))
    with pytest.raises(ConfigError, match="--attention-backend flash3 is not for b200-192gb"):
        print_dry_run(parse_arguments([*flags, "--gpu=b200-192gb", "--attention-backend=flash3"]))
    words = [flag for flag in flags if not flag.startswith("--vocab-size")]
    with pytest.raises(ConfigError, match="--vocab-size is required without --data-path: the dataset's token"):
        print_dry_run(parse_arguments(words))
    assert resolved(parse_arguments([*words, f"--data-path={data}"]), 4)[0].model.vocab_size == VOCAB
    with pytest.raises(ConfigError, match="--num-gpus 4 has no effect"):
        parse_arguments([*MODEL_FLAGS, "--num-gpus=4"])
