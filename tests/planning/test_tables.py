"""Tables of plans: whatever is in them, a terminal shows them line by line."""

from __future__ import annotations

from dataclasses import replace

from megatron_longpo.config import ParallelConfig
from megatron_longpo.planning.dry_run import RankMemory
from megatron_longpo.planning.hardware import gpu_named, usable_gib
from megatron_longpo.planning.layouts import Candidate
from megatron_longpo.planning.options import MEMORY_OPTIONS
from megatron_longpo.planning.parts import Part
from megatron_longpo.planning.search import Plan
from megatron_longpo.planning.step_time import StepTime
from megatron_longpo.planning.tables import layout_line, memory_table, plans_table
from tests.planning.cases import run_config

EVERY_PART = dict.fromkeys(Part, 2**38)
MEMORY = RankMemory(0, EVERY_PART, EVERY_PART, {Part.OPTIMIZER: 2**38})


def test_a_table_of_the_longest_layouts_and_options_fits_a_terminal() -> None:
    config = run_config()
    parallel = ParallelConfig(
        tensor_model_parallel_size=8,
        pipeline_model_parallel_size=16,
        num_layers_per_virtual_pipeline_stage=1,
        context_parallel_size=128,
        cp_comm_type="a2a+p2p",
        hierarchical_context_parallel_sizes=(8, 16),
    )
    config = replace(config, parallel=parallel, model=replace(config.model, num_layers=128))
    time = StepTime({"attention": 99999.0}, 8, 10**7, 1e20, 8 * 16 * 128, 989)
    plans = [Plan(Candidate((), config, option), time, (MEMORY, MEMORY)) for option in MEMORY_OPTIONS]
    text = plans_table(plans, 8 * 16 * 128 * 16)
    assert max(map(len, text.split("\n"))) <= 100
    assert "TP 8 · PP 16 × 8 · CP 128 a2a+p2p 8×16 · DP 16  " in text
    joined = " ".join(text.split())
    for option in MEMORY_OPTIONS:
        assert f" recomputed: {option.recomputed}; on the host: {option.on_host}, 256.0 GiB" in joined
    table = memory_table([MEMORY, MEMORY], None).partition("\n(")[0]
    assert max(map(len, table.split("\n"))) <= 100


def test_the_layout_names_everything_that_saves_memory() -> None:
    config = run_config()
    assert layout_line(config, 1).endswith(", whole optimizer, 8 micro-batches, recompute none, fp32")
    training = replace(
        config.training,
        bf16=True,
        recompute_granularity="selective",
        recompute_modules=("core_attn", "mlp"),
        mlp_chunk_tokens=4096,
        projection_chunk_tokens=2048,
        cpu_offloading_num_layers=3,
    )
    config = replace(
        config,
        training=training,
        parallel=ParallelConfig(use_distributed_optimizer=True),
        optimizer=replace(config.optimizer, optimizer_cpu_offload=True),
    )
    assert layout_line(config, 2) == (
        "2 GPUs: TP 1 · PP 1 · CP 1 · DP 2, sharded optimizer on the host, 4 micro-batches, recompute selective "
        "(core_attn mlp), MLP in pieces of 4096 tokens, projections in pieces of 2048 tokens, 3 layers per stage "
        "offloaded, bf16"
    )
    training = replace(training, recompute_granularity="full", recompute_keep_attention=True, mlp_chunk_tokens=None)
    assert "recompute full but attention, projections" in layout_line(replace(config, training=training), 2)


def test_a_run_that_needs_a_little_too_much_has_digits_that_differ() -> None:
    gpu = gpu_named("h100-80gb")
    usable = round(usable_gib(gpu) * 2**30)
    over = RankMemory(0, dict.fromkeys(Part, 0) | {Part.WEIGHTS: usable + 2**24}, EVERY_PART, {})
    assert "\n72.16 GiB does NOT fit in h100-80gb: 72.14 of 79.1 GiB" in memory_table([over], gpu)
