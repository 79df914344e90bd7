"""Dry runs against real steps: the same bytes, counted three ways."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state
from torch._subclasses.fake_tensor import FakeTensor
from torch.profiler import ProfilerActivity, profile

from megatron_longpo.attention.row_order import to_group_order
from megatron_longpo.data.layout import DocumentLayout, RowLayout
from megatron_longpo.model import offload
from megatron_longpo.planning import dry_run as dry_run_module
from megatron_longpo.planning.dry_run import RankMemory, dry_run
from megatron_longpo.planning.fake_world import fake_tensors
from megatron_longpo.planning.ledger import MemoryLedger
from megatron_longpo.planning.measured_step import MeasuredTrainer
from megatron_longpo.planning.on_gpu import hidden_bytes
from megatron_longpo.planning.parts import Part
from megatron_longpo.planning.two_memories import two_memories
from megatron_longpo.planning.workload import batch_of
from megatron_longpo.training.data import GlobalBatch
from megatron_longpo.training.distributed import initialize, shut_down
from tests.distributed.harness import run_ranks
from tests.planning.cases import FULL, measure_real_step, rows_of, run_config

SELECTIVE = "--recompute-granularity selective --recompute-modules mlp"
FRUGAL = "--mlp-chunk-tokens 100 --projection-chunk-tokens 90 --cpu-offloading-num-layers 3"


def planned(words: str = "", world_size: int = 1) -> list[RankMemory]:
    config = run_config(words, world_size)
    return dry_run(config, world_size, rows_of(config))


def test_layers_see_the_one_layout_with_their_own_window() -> None:
    layout = RowLayout((DocumentLayout(40, (3, 4)),))
    with fake_tensors(layout):
        assert RowLayout.from_tensor(torch.empty(5)) == layout
        assert RowLayout.from_tensor(torch.empty(5), 8) == replace(layout, window_tokens=8)


@pytest.mark.parametrize(
    ("words", "workspace"),
    [
        pytest.param("--global-batch-size 2", 0.01, marks=pytest.mark.slow),
        (f"--global-batch-size 2 --use-distributed-optimizer {FULL}", 0.01),
        # Where the CPU has no instructions for bf16, a matrix product adds up in an fp32 buffer of its own.
        (f"--global-batch-size 1 --bf16 {SELECTIVE} --turns independent", 0.04),
        pytest.param("--global-batch-size 1 --window-size 15,0", 0.01, marks=pytest.mark.slow),
        # So little is kept that the peak is inside of the CPU's attention kernel, which allocates for itself.
        (f"--global-batch-size 1 {FULL} --recompute-keep-attention {FRUGAL}", 0.04),
    ],
)
def test_a_dry_run_counts_what_a_real_step_allocates(
    words: str, workspace: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "OFFLOAD_FROM_BYTES", 2**12)
    config = run_config(words)
    (fake,) = dry_run(config, 1, rows_of(config))
    initialize(config)
    try:
        real, trainer = measure_real_step(config, 1)
        assert fake.parts == real
        assert fake.own_peaks == trainer.ledger.device.own_peaks
        assert all(fake.own_peaks[part] >= real[part] for part in Part)
        before = trainer.ledger.device.total
        allocated = _allocator_peak(trainer, tmp_path / "trace.json")
    finally:
        shut_down()
    # torch's allocator counts without knowing of storages and parts, kernels' own workspace included.
    assert allocated == pytest.approx(sum(real.values()) - before, rel=workspace)


@pytest.mark.parametrize(
    ("words", "share"),
    [
        ("--cpu-offloading-num-layers 4 --mlp-chunk-tokens 200", 0.5),
        pytest.param("", 1.0, marks=pytest.mark.slow),
        pytest.param("--cpu-offloading-num-layers 2", 0.0, marks=pytest.mark.slow),
    ],
)
def test_offloaded_tensors_are_host_memory_and_come_back_to_the_device(
    words: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "OFFLOAD_FROM_BYTES", 2**12)
    monkeypatch.setattr(dry_run_module, "as_on_gpu", lambda on_gpu, ledger: two_memories(ledger))
    config = run_config(f"--bf16 --global-batch-size 1 --use-distributed-optimizer {words}")
    # The trainer's checks refuse an optimizer on the host beside --use-cpu.
    hosted = replace(config.optimizer, optimizer_cpu_offload=share > 0, optimizer_offload_fraction=share)
    config = replace(config, optimizer=hosted)
    (fake,) = dry_run(config, 1, rows_of(config))
    initialize(config)
    try:
        real, trainer = measure_real_step(config, 1, around=two_memories)
    finally:
        shut_down()
    assert fake.parts == real
    assert fake.own_peaks == trainer.ledger.device.own_peaks
    assert fake.host == trainer.ledger.host.peak
    assert (fake.host[Part.ACTIVATIONS] > 2**20) == bool(words)
    # Megatron's HybridDeviceOptimizer: for a weight on the host fp32 weight, gradient and moments there, 16 B; for one
    # on the device fp32 weight and moments, 12 B, beside the gradient that it has anyway.
    weights, on_host = fake.parts[Part.WEIGHTS] / 2, fake.host[Part.OPTIMIZER] / 16
    assert share * weights * 0.999 <= on_host < (share + 0.2) * weights  # whole tensors, until the share is reached
    assert fake.parts[Part.OPTIMIZER] == pytest.approx(12 * (weights - on_host), rel=1e-2, abs=200)


def _allocator_peak(trainer: MeasuredTrainer, trace: Path) -> int:
    """Bytes that torch's CPU allocator had given out at most in a step, beyond those at its start."""
    config = trainer.config
    batch = batch_of(config, rows_of(config))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer._step(GlobalBatch([batch] * config.num_microbatches(1), [0] * config.training.global_batch_size))
    profiler.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        total += event["args"]["Bytes"]
        peak = max(peak, total)
    return peak


def test_groups_of_a2a_and_p2p_leave_no_fake_tensors_behind() -> None:
    config = run_config(f"--context-parallel-size 4 {HIERARCHICAL}", 4)
    (memory,) = dry_run(config, 4, rows_of(config))
    assert memory.own_peaks[Part.COMMUNICATION] > 0
    layout = batch_of(config, rows_of(config)).layout
    assert not isinstance(to_group_order(layout, 2, 0, torch.device("cpu")), FakeTensor)


HIERARCHICAL = "--cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 2 2"
LAYOUTS = {
    # gloo's threads hold the LM head's chunks for a moment longer than they need.
    "tensor and sequence": ("--tensor-model-parallel-size 2 --sequence-parallel", 0.03),
    # gloo copies what a reduce-scatter adds up; NCCL does not, nor does the fake process group.
    "sharded optimizer": (f"--context-parallel-size 2 --use-distributed-optimizer --bf16 {FULL}", 0.07),
    "interleaved": ("--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1", 0.01),
}
MORE_LAYOUTS = {
    "gathered context": ("--context-parallel-size 2", 0.01),
    "exchanged context": ("--context-parallel-size 2 --cp-comm-type a2a", 0.01),
    "pipeline": ("--pipeline-model-parallel-size 2", 0.01),
    "in pieces": (
        "--tensor-model-parallel-size 2 --sequence-parallel --mlp-chunk-tokens 64 --projection-chunk-tokens 64",
        0.03,
    ),
}


FOUR_RANKS = {"groups of a ring": (f"--context-parallel-size 4 {HIERARCHICAL} --mlp-chunk-tokens 64", 0.01)}


@pytest.mark.slow
@pytest.mark.parametrize(("layouts", "world_size"), [(LAYOUTS, 2), (MORE_LAYOUTS, 2), (FOUR_RANKS, 4)])
def test_one_rank_of_a_fake_world_counts_what_the_real_rank_allocates(
    layouts: dict[str, tuple[str, float]], world_size: int
) -> None:
    by_rank = run_ranks(_measure_layouts, world_size, layouts, world_size)
    for name, (words, tolerance) in layouts.items():
        stages = planned(words, world_size)
        real = [by_rank[0][name], by_rank[1][name]] if len(stages) == 2 else [by_rank[0][name]]
        for fake, parts in zip(stages, real, strict=True):
            assert sum(fake.parts.values()) == pytest.approx(sum(parts.values()), rel=tolerance), (name, fake, parts)
            for part in (Part.WEIGHTS, Part.GRADIENTS):
                assert fake.parts[part] == parts[part], (name, part)
            # The numbers that Adam counts its steps in are on one side a tensor more.
            assert fake.parts[Part.OPTIMIZER] == pytest.approx(parts[Part.OPTIMIZER], abs=64), name


def _measure_layouts(rank: int, layouts: dict[str, tuple[str, float]], world_size: int) -> dict[str, dict[Part, int]]:
    peaks = {}
    for name, (words, _) in layouts.items():
        config = run_config(words, world_size)
        initialize(config)
        peaks[name], _ = measure_real_step(config, world_size, parallel_state.get_context_parallel_rank())
        parallel_state.destroy_model_parallel()
    return peaks


def test_parts_are_what_arithmetic_says() -> None:
    (memory,) = planned("--bf16")
    layer = 128 * (2 * 128 + 2 * 64 + 3 * 320) + 2 * 128
    weights = 4 * layer + 2 * 1024 * 128 + 128
    # The rotary frequencies come on top.
    assert memory.parts[Part.WEIGHTS] == pytest.approx(2 * weights, rel=1e-4)
    assert memory.parts[Part.GRADIENTS] == pytest.approx(4 * weights, rel=1e-3)
    # fp32 weights and two moments, and a few scalars.
    assert memory.parts[Part.OPTIMIZER] == pytest.approx(12 * weights, rel=1e-3)


@pytest.mark.slow
def test_every_kind_of_parallelism_divides_its_part() -> None:
    (whole,) = planned("--bf16 --use-distributed-optimizer")
    (sharded,) = planned("--bf16 --use-distributed-optimizer", 8)
    assert sharded.parts[Part.OPTIMIZER] == pytest.approx(whole.parts[Part.OPTIMIZER] / 8, rel=0.01)
    assert sharded.parts[Part.WEIGHTS] == whole.parts[Part.WEIGHTS]
    (tensor,) = planned("--bf16 --use-distributed-optimizer --tensor-model-parallel-size 4 --sequence-parallel", 4)
    assert tensor.parts[Part.WEIGHTS] == pytest.approx(whole.parts[Part.WEIGHTS] / 4, rel=0.01)
    assert tensor.parts[Part.ACTIVATIONS] == pytest.approx(whole.parts[Part.ACTIVATIONS] / 4, rel=0.3)
    (context,) = planned("--bf16 --use-distributed-optimizer --context-parallel-size 4", 4)
    assert context.parts[Part.ACTIVATIONS] == pytest.approx(whole.parts[Part.ACTIVATIONS] / 4, rel=0.1)
    (again,) = planned(f"--bf16 --use-distributed-optimizer {FULL}")
    assert again.parts[Part.ACTIVATIONS] < whole.parts[Part.ACTIVATIONS] / 2.5
    first, last = planned("--bf16 --pipeline-model-parallel-size 4 --global-batch-size 8", 4)
    assert first.parts[Part.WEIGHTS] < whole.parts[Part.WEIGHTS] / 2
    assert first.parts[Part.ACTIVATIONS] > 2 * last.parts[Part.ACTIVATIONS]


@pytest.mark.parametrize(
    ("words", "world_size"),
    [
        ("--global-batch-size 4", 1),
        pytest.param("--pipeline-model-parallel-size 2 --global-batch-size 6", 2, marks=pytest.mark.slow),
        pytest.param(
            "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --global-batch-size 8",
            2,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_more_micro_batches_than_are_measured_need_no_more_memory(
    words: str, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fewer = planned(words, world_size)
    monkeypatch.setattr(
        dry_run_module, "num_measured_microbatches", lambda config, world, stage: config.num_microbatches(world)
    )
    # Metrics are kept of every micro-batch: a few bytes.
    assert [m.gib for m in planned(words, world_size)] == pytest.approx([m.gib for m in fewer], rel=1e-4)


def test_a_gpu_holds_no_fp32_copy_of_the_lm_head_and_its_norms_keep_less(monkeypatch: pytest.MonkeyPatch) -> None:
    (on_cpu,) = planned("--bf16")
    config = run_config("--bf16 --no-use-cpu")
    (on_gpu,) = dry_run(config, 1, rows_of(config))
    assert on_gpu.parts[Part.WEIGHTS] == on_cpu.parts[Part.WEIGHTS]
    assert on_gpu.parts[Part.ACTIVATIONS] < on_cpu.parts[Part.ACTIVATIONS]
    monkeypatch.setattr("megatron_longpo.planning.on_gpu.NORM_IS_A_KERNEL", False)
    (with_formula,) = dry_run(config, 1, rows_of(config))
    norms = 2 * config.model.num_layers * rows_of(config)[0].layout.num_tokens * config.model.hidden_size
    # Before torch 2.9: the input in fp32, and what the weight is multiplied by.
    assert with_formula.parts[Part.ACTIVATIONS] > on_gpu.parts[Part.ACTIVATIONS] + 6 * norms


def test_flash_attention_s_own_buffers_are_counted() -> None:
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    q = torch.empty(1, 8, 200, 64, dtype=torch.bfloat16, device="meta")
    k = torch.empty(1, 2, 300, 64, dtype=torch.bfloat16, device="meta")
    rounded = 4 * 8 * 256 * (64 + 1)
    assert hidden_bytes(backward, (q, q, q)) == rounded
    assert hidden_bytes(backward, (q, q, k)) == rounded + 2 * 8 * 300 * 64 * 2
    assert hidden_bytes(torch.ops.aten.mm.default, (q, q)) == 0


def test_the_ledger_counts_storages_once_until_they_end() -> None:
    ledger = MemoryLedger()
    with ledger, ledger.everything_is(Part.WEIGHTS):
        one = torch.zeros(1000)
        view = one.view(10, 100)
        two = torch.zeros(500)
        del one
        assert ledger.device.live[Part.WEIGHTS] == 6000
        del two
        assert ledger.device.live[Part.WEIGHTS] == 4000
        del view
    assert ledger.device.total == 0
    assert ledger.device.peak_total == 6000


@pytest.mark.slow
@pytest.mark.parametrize(("num_gpus", "cp", "tokens"), [(64, 4, 131072), (256, 16, 524288)])
def test_llama_3_1_70b_is_dry_run_in_two_minutes_and_16_gib(num_gpus: int, cp: int, tokens: int) -> None:
    import resource
    import time

    from megatron_longpo.arguments import parse_arguments
    from megatron_longpo.planning.parallel_dry_runs import dry_runs
    from megatron_longpo.planning.workload import made_up_rows

    words = (
        "--num-layers 80 --hidden-size 8192 --ffn-hidden-size 28672 --num-attention-heads 64 --group-query-attention "
        "--num-query-groups 8 --swiglu --disable-bias-linear --untie-embeddings-and-output-weights --vocab-size 128256 "
        f"--bf16 --max-position-embeddings {tokens} --seq-length {tokens} --tensor-model-parallel-size 8 "
        f"--sequence-parallel --pipeline-model-parallel-size 2 --context-parallel-size {cp} "
        f"--use-distributed-optimizer {FULL}"
    )
    config = parse_arguments(words.split()).with_device_defaults("local", "nccl")
    start_s = time.monotonic()
    (stages,) = dry_runs([(config, num_gpus)], made_up_rows(config))
    assert time.monotonic() - start_s < 120
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20 * 2 < 16
    assert 30 < max(stage.gib for stage in stages) < 60
