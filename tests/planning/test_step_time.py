"""Predicted time: the formulas at sizes where they are known, and what they say of published runs."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_longpo.arguments import parse_arguments
from megatron_longpo.attention import ring
from megatron_longpo.config import ConfigError, RunConfig
from megatron_longpo.data.layout import DocumentLayout, RowLayout
from megatron_longpo.planning import dry_run_command
from megatron_longpo.planning.hardware import GPU, GPUS, H100, MEASURED_LINK_SHARE, gpu_named, usable_gib
from megatron_longpo.planning.links import all_gather_s, all_reduce_s, all_to_all_s, ring_bytes_per_s
from megatron_longpo.planning.recomputation import Repeated, repeated
from megatron_longpo.planning.ring_work import hop_tokens, step_shares
from megatron_longpo.planning.saved import kept_bytes
from megatron_longpo.planning.step_time import StepTime, parameters_of_rank
from megatron_longpo.planning.workload import made_up_rows, work_of

SHAPE = (
    "--num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 --group-query-attention "
    "--num-query-groups 8 --swiglu --disable-bias-linear --vocab-size 32000 --untie-embeddings-and-output-weights "
    "--bf16 --seq-length 32768 --max-position-embeddings 32768 "
)
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"


def config_of(words: str = "") -> RunConfig:
    return parse_arguments((SHAPE + words).split())


def predicted(words: str = "", num_gpus: int = 8, gpu: GPU = H100) -> StepTime:
    return dry_run_command.predicted(config := config_of(words), num_gpus, made_up_rows(config), gpu)


def test_compute_is_flops_over_rate_and_divides_over_all_ranks() -> None:
    one = predicted(num_gpus=1)
    # 3 passes · 2 FLOPs · 32 layers · weights of a layer · tokens · documents.
    weights = 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336)
    tokens = 32768 + 2240
    assert one.tokens == 8 * tokens
    assert one.parts["matrix products"] == pytest.approx(6 * 32 * weights * one.tokens / (H100.matmul_tflops * 1e12))
    for words in (
        "",
        "--tensor-model-parallel-size 8",
        "--context-parallel-size 8",
        "--pipeline-model-parallel-size 8",
    ):
        eighth = predicted(words).parts
        for part in ("matrix products", "attention"):
            assert eighth[part] == pytest.approx(one.parts[part] / 8, rel=1e-3), (words, part)


def test_mfu_is_model_flops_over_peak_and_cannot_exceed_the_rates() -> None:
    step = predicted()
    assert step.mfu == pytest.approx(step.flops / step.seconds / 8 / (H100.peak_tflops * 1e12))
    assert 0.2 < step.mfu < H100.matmul_tflops / H100.peak_tflops
    assert step.gpu_hours(100) == pytest.approx(100 * step.seconds / 8 * 8 / 3600)
    assert sum(step.parts.values()) == pytest.approx(step.seconds)


def test_the_bubble_shrinks_with_micro_batches_and_virtual_stages() -> None:
    plain = predicted("--pipeline-model-parallel-size 4 --context-parallel-size 2")
    per_micro_batch = (
        plain.seconds - sum(plain.parts[p] for p in ("pipeline bubble", "data parallel", "optimizer"))
    ) / 8
    assert plain.parts["pipeline bubble"] == pytest.approx(3 * per_micro_batch)
    virtual = predicted(
        "--pipeline-model-parallel-size 4 --context-parallel-size 2 --num-layers-per-virtual-pipeline-stage 2"
    )
    assert virtual.parts["pipeline bubble"] < plain.parts["pipeline bubble"] / 3.9
    assert virtual.parts["pipeline transfers"] == 0 < plain.parts["pipeline transfers"]


def test_recomputation_repeats_its_share_of_the_forward_pass() -> None:
    none, full = predicted(), predicted(FULL)
    assert none.parts["recomputation"] == 0
    forward = none.parts["matrix products"] / 3
    # Backward is 2.5 times the FLOPs at another rate.
    rates = H100.attention_rates("auto")
    attention = none.parts["attention"] / (1 + 2.5 * rates[0] / rates[1])
    assert full.parts["recomputation"] == pytest.approx(forward + attention)
    block = "--recompute-granularity full --recompute-method block --recompute-num-layers 8"
    assert repeated(config_of(block)) == Repeated(0.25, 0.25, 0.25, 0.25, 0.5)
    mlp = repeated(config_of("--recompute-granularity selective --recompute-modules mlp"))
    assert mlp.attention == 0 and mlp.matmul == pytest.approx(3 * 14336 / (3 * 14336 + 2 * 4096 + 2 * 1024))
    assert repeated(config_of("--recompute-granularity selective")) == Repeated(0.0, 0.0, 1.0, 1.0, 0.0)
    # Kept attention runs once, and needs the exchanged heads again; an MLP in pieces runs once more, whatever else.
    assert repeated(config_of(f"{FULL} --recompute-keep-attention")) == Repeated(1.0, 1.0, 0.0, 1.0, 2.0)
    assert repeated(config_of(f"{FULL} --mlp-chunk-tokens 4096")).matmul == pytest.approx(1 + mlp.matmul)


def test_what_is_computed_again_is_reduced_again() -> None:
    def all_reduces(words: str) -> float:
        gpu = dataclasses.replace(H100, nvlink_gbs=1e-3)
        tokens = predicted("--tensor-model-parallel-size 8").tokens
        parts = predicted(f"--tensor-model-parallel-size 8 {words}", gpu=gpu).parts
        return parts["tensor parallel"] * 1e6 * MEASURED_LINK_SHARE / (2 * 7 / 8 * 2 * 4096 * tokens)

    pieces = "--mlp-chunk-tokens 4096"
    assert all_reduces("") == pytest.approx(32 * 4 + 2, rel=1e-3)
    assert all_reduces(FULL) == pytest.approx(32 * 6 + 2, rel=1e-3)
    # The MLP has one of a layer's two.
    assert all_reduces(pieces) == pytest.approx(32 * 5 + 2, rel=1e-3)
    assert all_reduces(f"{FULL} {pieces}") == pytest.approx(32 * 7 + 2, rel=1e-3)
    assert all_reduces("--recompute-granularity selective --recompute-modules mlp") == pytest.approx(162, rel=1e-3)


def test_a_chunk_of_heads_is_waited_for_and_the_others_hide_behind_attention() -> None:
    def gathering_s(words: str, link_gbs: float) -> float:
        gpu = dataclasses.replace(H100, nvlink_gbs=link_gbs)
        return predicted(f"--context-parallel-size 8 {words}", gpu=gpu).parts["context parallel"]

    config = config_of("--context-parallel-size 8")
    tokens = work_of(config, made_up_rows(config), 1).layout.padded_tokens
    # Keys and values twice in bf16 and their gradients in fp32, of 32 layers and 8 rows.
    at_once_s = 8 * 32 * 7 / 8 * 2 * 1024 * tokens * (2 + 2 + 4) / 1e9 / MEASURED_LINK_SHARE
    # In backward the first chunk is gathered ahead of its layer.
    assert gathering_s("", 450) == pytest.approx(at_once_s / 450 / 4 * (2 + 4) / 8)
    attention_s = predicted("--context-parallel-size 8").parts["attention"]
    assert gathering_s("", 1) == pytest.approx(at_once_s * (1 - 2 / 8 / 4) - 3 / 4 * attention_s)
    # Computed again, attention gathers again and hides more.
    assert gathering_s(FULL, 450) == pytest.approx(at_once_s * 10 / 8 / 450 / 4)


def test_rings_run_on_nvlink_inside_a_node_and_on_every_network_card_outside() -> None:
    nvlink, network = H100.nvlink_gbs * 1e9 * MEASURED_LINK_SHARE, H100.network_gbs * 1e9 * MEASURED_LINK_SHARE
    assert ring_bytes_per_s(H100, 8, stride=1) == nvlink
    assert ring_bytes_per_s(H100, 8, stride=2) == 4 * network
    assert ring_bytes_per_s(H100, 8, stride=8) == network
    # Of every 4 neighbours on nodes of 6, some have 2 on either side; on a node of their own all are together.
    six = dataclasses.replace(H100, gpus_per_node=6)
    assert ring_bytes_per_s(six, 6, stride=1) == ring_bytes_per_s(six, 3, stride=2) == nvlink
    assert ring_bytes_per_s(six, 4, stride=1) == 2 * network
    assert ring_bytes_per_s(six.of_run(4), 4, stride=1) == nvlink
    assert all_reduce_s(H100, 1e9, 8, stride=1) == pytest.approx(2 * 7 / 8 * 1e9 / nvlink)
    assert all_gather_s(H100, 1e9, 1, stride=1) == all_to_all_s(H100, 1e9, 1, stride=1) == 0
    assert all_to_all_s(H100, 1e9, 8, stride=8) == pytest.approx(7 / 8 * 1e9 / network)


def test_grouped_queries_make_gathering_cheap_and_exchange_does_not_grow_with_ranks() -> None:
    def context_s(kind: str, cp: int) -> float:
        return predicted(f"--context-parallel-size {cp} --cp-comm-type {kind}", 8).parts["context parallel"]

    # A gather brings the whole row's keys and values to every rank, an exchange only moves the rank's own tokens.
    assert context_s("all_gather", 8) / context_s("all_gather", 4) == pytest.approx(7 / 8 / (3 / 4) * 2, rel=0.01)
    assert context_s("a2a", 8) / context_s("a2a", 4) == pytest.approx(7 / 8 / (3 / 4), rel=0.01)


def test_groups_of_a_ring_take_fewer_steps_of_the_same_bytes() -> None:
    slow = dataclasses.replace(H100, network_gbs=0.01)  # nothing hides it

    def context_s(words: str) -> float:
        return predicted(f"--tensor-model-parallel-size 2 --context-parallel-size 16 {words}", 32, slow).parts[
            "context parallel"
        ]

    ring = context_s("--cp-comm-type p2p")
    groups = context_s("--cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 4 4")
    # K and V 2(n - 1) times in bf16 and n - 1 times their gradients in fp32, 16 and 4 steps.
    assert groups / ring == pytest.approx(3 / 15, rel=0.02)


def ring_seconds(words: str, gbs: float) -> float:
    """What `SHAPE` on a ring of 8 waits for in a micro-batch."""
    gpu = dataclasses.replace(H100, nvlink_gbs=gbs)
    return predicted(f"--context-parallel-size 8 --cp-comm-type p2p {words}", gpu=gpu).parts["context parallel"] / 8


def test_a_ring_hides_a_hop_behind_the_attention_of_its_step() -> None:
    config = config_of("--context-parallel-size 8 --cp-comm-type p2p")
    tokens = work_of(config, made_up_rows(config), 1).layout.local_tokens
    hop_s = 32 * tokens * 2 * 1024 / 1e9 / MEASURED_LINK_SHARE  # of a byte per value, at 1 GB/s
    # Fast enough, only the gradients of the last step are waited for: 4 bytes in fp32.
    assert ring_seconds("", 450) == pytest.approx(4 * hop_s / 450)
    # Too slow for any, the attention of the steps that send hides something: 7 of 8 forward, all in backward.
    parts = predicted("--context-parallel-size 8 --cp-comm-type p2p").parts
    forward = parts["attention"] / 8 / (1 + 2.5 * H100.attention_tflops[0] / H100.attention_tflops[1])
    hidden_s = parts["attention"] / 8 - forward / 8
    assert ring_seconds("", 0.01) == pytest.approx(7 * (2 + 2 + 4) * hop_s / 0.01 - hidden_s)


@pytest.mark.parametrize("window", ["full", "2047,0"])
def test_a_ring_s_bytes_are_those_that_the_code_sends(window: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(f"--context-parallel-size 4 --cp-comm-type p2p --window-size {window}")
    layout = work_of(config, made_up_rows(config), 1).layout
    layout = dataclasses.replace(layout, window_tokens=config.model.window_size.num_tokens)
    hops: list[list[int]] = []
    batched = dist.batch_isend_irecv

    def counted(operations: list[dist.P2POp]) -> list[dist.Work]:
        hops[-1].append(operations[0].tensor.nbytes)
        return batched(operations)

    monkeypatch.setattr(dist, "batch_isend_irecv", counted)
    for computation in ("forward_into", "backward_into"):
        monkeypatch.setattr(ring, computation, lambda *arguments: None)
    for rank in range(4):
        hops.append([])
        dist.init_process_group("fake", rank=rank, world_size=4, store=FakeStore())
        try:
            k = torch.zeros(layout.local_tokens, 1, 8, dtype=torch.bfloat16, requires_grad=True)
            ring.ring_attention(k, k, k, layout, dist.group.WORLD, 1.0).sum().backward()
        finally:
            dist.destroy_process_group()
    # The slowest rank makes a hop as long as it is.
    sent = sum(max(ranks) for ranks in zip(*hops, strict=True))
    slow = dataclasses.replace(H100, nvlink_gbs=1e-6)  # nothing hides it
    seconds = predicted(f"--context-parallel-size 4 --cp-comm-type p2p --window-size {window}", 4, slow)
    in_code = 8 * 32 * 1024 / 8 * sent / 1e3 / MEASURED_LINK_SHARE  # 8 rows, 32 layers, 1,024 values in place of 8
    assert seconds.parts["context parallel"] == pytest.approx(in_code, rel=1e-3)


def test_a_window_shortens_the_hops_and_leaves_them_less_to_hide_behind() -> None:
    window = "--window-size 1023,0"
    layout = RowLayout((DocumentLayout(32768, (512, 512)),), 8)
    small = dataclasses.replace(layout, window_tokens=1024)
    # Of both chunks of 2,048 tokens the last 1,023, and the pieces of the branches.
    assert hop_tokens(layout) == 32768 / 8 + 128 and hop_tokens(small) == 2 * 1023 + 128
    assert step_shares(layout) == (1 / 8,) * 8
    shares = step_shares(small)
    assert sum(shares) == pytest.approx(1) and shares[0] > 0.7 and max(shares[2:7]) < 0.02
    assert ring_seconds(window, 0.01) < 0.6 * ring_seconds("", 0.01)
    # Where full attention hides all hops, a window leaves steps that compute next to nothing.
    assert ring_seconds(window, 450) > 1.5 * ring_seconds("", 450) * hop_tokens(small) / hop_tokens(layout)


def test_transfers_to_the_host_hide_behind_computation_until_the_link_is_too_slow() -> None:
    offloaded = f"{FULL} --recompute-keep-attention --cpu-offloading-num-layers 32"
    assert predicted().parts["host transfers"] == 0
    assert predicted(offloaded).parts["host transfers"] == 0
    config = config_of(offloaded)
    one_layer = kept_bytes(config, work_of(config, made_up_rows(config), 1)) / (1e9 * MEASURED_LINK_SHARE)
    stages = "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 4 "
    in_stages = predicted(stages + offloaded.replace("32", "4")).parts["host transfers"]
    assert in_stages == pytest.approx(2 * one_layer / H100.host_link_gbs)  # of two micro-batches
    slow = dataclasses.replace(H100, host_link_gbs=1)
    both_ways = 2 * 32 * one_layer
    assert 0.5 * both_ways < predicted(offloaded, gpu=slow).parts["host transfers"] < both_ways
    half = predicted(offloaded.replace("32", "16"), gpu=slow).parts["host transfers"]
    assert half < predicted(offloaded, gpu=slow).parts["host transfers"] / 2


def test_an_optimizer_moves_the_bytes_of_its_shard_here_or_on_the_host() -> None:
    parameters = parameters_of_rank(config_of("--bf16"))
    sharded, offloaded = (
        "--bf16 --use-distributed-optimizer",
        "--bf16 --use-distributed-optimizer --optimizer-cpu-offload",
    )
    # Zeroed; normed, clipped, Adam, cast.
    per_weight, shared = 4 * parameters, 46 * parameters
    assert predicted("--bf16").parts["optimizer"] == pytest.approx((per_weight + shared) / H100.mem_gbs / 1e9)
    on_device = predicted(sharded).parts["optimizer"]
    assert on_device == pytest.approx((per_weight + shared / 8) / H100.mem_gbs / 1e9)
    shard = parameters / 8
    seconds = (34 * shard / H100.host_mem_gbs + 6 * shard / H100.host_link_gbs) / 1e9 / MEASURED_LINK_SHARE
    on_host = predicted(offloaded).parts["optimizer"]
    assert on_host - on_device == pytest.approx(seconds - 34 * shard / H100.mem_gbs / 1e9)


def test_attention_takes_as_long_as_its_backend() -> None:
    def attention_s(words: str, gpu: GPU = H100) -> float:
        return predicted(f"--bf16 {words}", gpu=gpu).parts["attention"]

    flash, fused = attention_s("--attention-backend flash"), attention_s("--attention-backend fused")
    assert attention_s("") == fused  # on Hopper
    assert flash / fused == pytest.approx((1 / 370 + 2.5 / 322) / (1 / 595 + 2.5 / 516))
    for name in ("a100-80gb", "b200-192gb"):
        assert attention_s("", GPUS[name]) == attention_s("--attention-backend flash", GPUS[name])
    unknown = gpu_named("mine", peak_tflops=400, mem_gib=64, link_gbs=50)
    assert attention_s("", unknown) == attention_s("--attention-backend fused", unknown)
    measured = H100.with_rates(None, [500, 400])
    assert attention_s("", measured) == attention_s("--attention-backend flash3", measured)


def test_an_unknown_gpu_is_described_by_three_numbers() -> None:
    with pytest.raises(ConfigError, match=r"--gpu h100 is not known; did you mean h100-80gb.*--peak-tflops.*--mem-gib"):
        gpu_named("h100")
    for name, meant in {"H100": "h100-80gb", "b200": "b200-192gb", "A100-80GB": "a100-80gb"}.items():
        with pytest.raises(ConfigError, match=f"--gpu {name} is not known; did you mean {meant}"):
            gpu_named(name)
    with pytest.raises(ConfigError, match=r"--gpu l40s-48gb is not known; known: .*takes tools/plan_run.py with"):
        gpu_named("l40s-48gb")
    assert usable_gib(gpu_named("h100-80gb", mem_gib=2)) == 0
    with pytest.raises(ConfigError, match="--link-gbs"):
        gpu_named("mine", peak_tflops=500, mem_gib=64)
    mine = gpu_named("mine", peak_tflops=494.5, mem_gib=64, link_gbs=25)
    assert mine.matmul_tflops == pytest.approx(H100.matmul_tflops / 2)
    assert gpu_named("h100-80gb", mem_gib=60).mem_gib == 60
    for gpu in GPUS.values():
        assert gpu.matmul_tflops < gpu.peak_tflops and usable_gib(gpu) < gpu.mem_gib
    measured = H100.with_rates(700, [400, 350])
    assert (measured.matmul_tflops, measured.attention_tflops) == (700, (400, 350))
    rates = {"attention_tflops": (370, 322), "other_attention_tflops": (595, 516)}
    assert dataclasses.replace(measured, matmul_tflops=794.5, **rates) == H100
