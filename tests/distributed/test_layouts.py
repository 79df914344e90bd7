"""One global batch under every parallel layout: losses, metrics and gradients equal one process's.

With the distributed optimizer it is two steps: losses, metrics and updated weights. What the ranks sent each other from
the reference pass to the checkpoint would not make them wait forever under NCCL either.
All layouts of a world of four run in the same four processes, one after another; data parallelism fills the rest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import megatron_longpo.platform  # noqa: F401  before Megatron-Core  # isort: skip
import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

from tests.distributed.harness import run_ranks
from tests.distributed.nccl_order import check_nccl_order
from tests.distributed.one_step import run_all, save_model_and_run_all
from tests.tiny import MODEL_FLAGS, write_tiny_dataset

TP, PP, CP = "--tensor-model-parallel-size=2", "--pipeline-model-parallel-size=2", "--context-parallel-size=2"
FULL = ["--recompute-granularity=full", "--recompute-method=uniform", "--recompute-num-layers=1"]
KEPT = [*FULL, "--recompute-keep-attention"]
PIECES = ["--mlp-chunk-tokens=16", "--projection-chunk-tokens=10"]
LAYOUTS = {
    "DP 4": [],
    "DP 2 of two documents a row": ["--micro-batch-size=2", TP],
    "TP 2": [TP],
    "TP 2 + sequence parallel": [TP, "--sequence-parallel"],
    "PP 2": [PP],
    "interleaved PP 2": [PP, "--num-layers-per-virtual-pipeline-stage=1"],
    "CP 2 all-gather": [CP],
    "CP 2 all-to-all": [CP, "--cp-comm-type=a2a"],
    "CP 2 ring": [CP, "--cp-comm-type=p2p"],
    "CP 4": ["--context-parallel-size=4"],
    "CP 4 ring": ["--context-parallel-size=4", "--cp-comm-type=p2p"],
    "CP 2 x 2 all-to-all and ring": [
        "--context-parallel-size=4",
        "--cp-comm-type=a2a+p2p",
        *("--hierarchical-context-parallel-sizes", "2", "2"),
    ],
    "TP 2 x CP 2 ring + sequence parallel": [TP, CP, "--cp-comm-type=p2p", "--sequence-parallel"],
    "CP 2 ring + attention kept": [CP, "--cp-comm-type=p2p", *KEPT],
    "TP 2 x CP 2": [TP, CP],
    "TP 2 x CP 2 + sequence parallel": [TP, CP, "--sequence-parallel"],
    "TP 2 x PP 2": [TP, PP],
    "PP 2 x CP 2": [PP, CP],
    "TP 2 + full recompute": [TP, *FULL],
    "TP 2 + sequence parallel + in pieces": [TP, "--sequence-parallel", *PIECES, *KEPT],
    "PP 2 + attention kept": [PP, *KEPT],
    "interleaved PP 2 + attention kept": [PP, "--num-layers-per-virtual-pipeline-stage=1", *KEPT],
    "CP 2 all-gather + attention kept": [CP, *KEPT],
    "CP 2 all-to-all + attention kept": [CP, "--cp-comm-type=a2a", *KEPT],
    "CP 2 + selective recompute": [CP, "--recompute-granularity=selective", "--recompute-modules=core_attn"],
}
OBJECTIVES = {
    "longpo": ["--objective=longpo", "--lambda=0.5"],
    "dpo": ["--objective=dpo", "--lambda=0.5", "--turns=independent", "--turn-reduction=mean"],
    "sft-rejected": ["--objective=sft-rejected"],
    "constraint": ["--objective=sft-chosen-constraint"],
    "window": ["--objective=longpo", "--lambda=0.5", "--window-size=20,0", "--reference-window-size=full"],
}
OVERLAPPED = ["--overlap-grad-reduce", "--overlap-param-gather"]
ZERO = {
    "DP 4": [],
    "TP 2 + sequence parallel": [TP, "--sequence-parallel"],
    "overlapped": OVERLAPPED,
    "CP 2 + attention kept + in pieces, overlapped": [CP, *KEPT, *PIECES, *OVERLAPPED],
    "PP 2": [PP],
}
ABSOLUTE = 1e-5
"""Rewards are small differences of sums of some hundreds, in fp32."""
Case = tuple[str, str]

DEFAULT: list[Case] = [
    ("longpo", "DP 4"),
    ("longpo", "interleaved PP 2"),
    ("longpo", "CP 2 ring + attention kept"),
    ("longpo", "CP 2 x 2 all-to-all and ring"),
    ("longpo", "TP 2 + sequence parallel + in pieces"),
    ("dpo", "TP 2 x CP 2"),
]
DEFAULT_ZERO = ["TP 2 + sequence parallel"]
TIED_ACROSS_STAGES: list[Case] = [("longpo", "PP 2"), ("longpo", "interleaved PP 2"), ("longpo", "TP 2 x PP 2")]
MORE: list[Case] = [("longpo", name) for name in LAYOUTS if ("longpo", name) not in DEFAULT]
MORE += [("dpo", "PP 2"), ("dpo", "CP 2 all-to-all"), ("constraint", "TP 2 x CP 2"), ("constraint", "PP 2")]
MORE += [("constraint", "CP 2 all-to-all")]
MORE += [
    ("sft-rejected", "CP 2 all-gather"),
    ("window", "CP 2 x 2 all-to-all and ring"),
    ("window", "CP 4 ring"),
    ("window", "CP 2 ring + attention kept"),
]
MORE_ZERO = [name for name in ZERO if name not in DEFAULT_ZERO]
# With the parameters that every tensor-parallel rank has whole, and Qwen's biases.
MODEL = [*MODEL_FLAGS, "--qk-layernorm", "--add-qkv-bias"]
TIED = [flag for flag in MODEL if flag != "--untie-embeddings-and-output-weights"]
COMMON = [
    "--seq-length=512",
    "--global-batch-size=8",
    "--train-iters=2",
    "--split=90,10",
    "--lr=1e-2",
    "--lr-decay-style=constant",
    "--lr-warmup-fraction=0",
    "--adam-eps=1e-2",
    "--beta=0.5",
    "--num-workers=0",
    "--progress-bar=off",
    "--logits-chunk-tokens=16",
    "--finetune",
]


def load_tensors(folders: dict[str, str]) -> dict[str, dict[str, torch.Tensor]]:
    def floats(folder: str) -> dict[str, torch.Tensor]:
        loaded = dist_checkpointing.load_plain_tensors(str(Path(folder) / "iter_0000001"))
        return {k: v for k, v in loaded.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return {name: floats(folder) for name, folder in folders.items()}
    finally:
        dist.destroy_process_group()


def compute(folder: Path, cases: list[Case], zero: list[str], model: list[str]) -> dict[str, Any]:
    """Metrics and gradients of one process and of the given cases, all from one random model."""
    data = str(write_tiny_dataset(folder / "data" / "tiny", num_documents=20))
    start = [*model, *COMMON, f"--load={folder / 'start'}"]
    step_flags = [*start, *OBJECTIVES["longpo"]]
    places: dict[str, str] = {}

    def place(name: str, suffix: str = "") -> str:
        places[name] = f"{folder / str(len(places))}{suffix}"
        return places[name]

    singles = [([*start, *flags], data, place(f"one {name}")) for name, flags in OBJECTIVES.items()]
    singles.append((step_flags, data, place("one step", "-step")))
    layouts = [([*start, *OBJECTIVES[o], *LAYOUTS[name]], data, place(f"{o} {name}")) for o, name in cases]
    sharded = [*step_flags, "--use-distributed-optimizer"]
    layouts += [([*sharded, *ZERO[name]], data, place(f"zero {name}", "-step")) for name in zero]

    alone = run_ranks(save_model_and_run_all, 1, singles, str(folder), model)[0]
    ranks = run_ranks(run_all, 4, layouts, str(folder), forked=False)
    names = [f"{objective} {name}" for objective, name in cases] + [f"zero {name}" for name in zero]
    return {
        "single": dict(zip([*OBJECTIVES, "step"], (metrics for metrics, _ in alone), strict=True)),
        "metrics": {name: [rank[i][0] for rank in ranks] for i, name in enumerate(names)},
        "operations": {name: [rank[i][1] for rank in ranks] for i, name in enumerate(names)},
        "tensors": load_tensors(places),
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return compute(tmp_path_factory.mktemp("layouts"), DEFAULT, DEFAULT_ZERO, MODEL)


@pytest.fixture(scope="module")
def more_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return compute(tmp_path_factory.mktemp("layouts"), MORE, MORE_ZERO, MODEL)


@pytest.fixture(scope="module")
def tied_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return compute(tmp_path_factory.mktemp("layouts"), TIED_ACROSS_STAGES, ["PP 2"], TIED)


def assert_equal_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], what: str) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        # Vocabulary padding depends on TP and holds nothing.
        rows = min(len(expected), len(ours[name]))
        difference = (ours[name][:rows] - expected[:rows]).norm() / expected.norm().clamp_min(1e-30)
        assert difference < 1e-5, f"{what} of {name}: relative difference {difference:.2e}"


def check_layout(results: dict[str, Any], objective: str, layout: str) -> None:
    expected = dict(results["single"][objective])
    # DPO's reference is the model itself at first: margins are 0 up to rounding, and their sign says nothing.
    ignored = set()
    if objective == "dpo":
        ignored = {"rewards/accuracies", *(name for name in expected if name.startswith("eval/rewards/"))}
    for rank in results["metrics"][f"{objective} {layout}"]:
        assert rank.keys() == expected.keys()
        compared = {name: value for name, value in rank.items() if name not in ignored}
        assert compared == pytest.approx({name: expected[name] for name in compared}, rel=1e-5, abs=ABSOLUTE)
    gradients = results["tensors"][f"one {objective}"]
    assert len(gradients) > 5 and all(gradient.norm() > 1e-3 for gradient in gradients.values())
    assert_equal_tensors(results["tensors"][f"{objective} {layout}"], gradients, "gradient")
    assert all(len(operations) > 30 for operations in results["operations"][f"{objective} {layout}"])
    check_nccl_order(results["operations"][f"{objective} {layout}"])


def check_zero(results: dict[str, Any], layout: str) -> None:
    for rank in results["metrics"][f"zero {layout}"]:
        assert rank == pytest.approx(results["single"]["step"], rel=1e-5, abs=ABSOLUTE)
    assert_equal_tensors(results["tensors"][f"zero {layout}"], results["tensors"]["one step"], "updated weight")
    check_nccl_order(results["operations"][f"zero {layout}"])


@pytest.mark.parametrize(("objective", "layout"), DEFAULT)
def test_layout_equals_one_process(results: dict[str, Any], objective: str, layout: str) -> None:
    check_layout(results, objective, layout)


@pytest.mark.parametrize("layout", DEFAULT_ZERO)
def test_distributed_optimizer_makes_the_same_steps(results: dict[str, Any], layout: str) -> None:
    check_zero(results, layout)


def test_objectives_differ(results: dict[str, Any]) -> None:
    losses = {name: results["single"][name]["loss"] for name in OBJECTIVES}
    assert len(set(losses.values())) == len(losses), losses


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "layout"), MORE)
def test_more_layouts_equal_one_process(more_results: dict[str, Any], objective: str, layout: str) -> None:
    check_layout(more_results, objective, layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", MORE_ZERO)
def test_distributed_optimizer_in_more_layouts(more_results: dict[str, Any], layout: str) -> None:
    check_zero(more_results, layout)


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "layout"), TIED_ACROSS_STAGES)
def test_tied_embeddings_of_two_stages(tied_results: dict[str, Any], objective: str, layout: str) -> None:
    check_layout(tied_results, objective, layout)
    check_zero(tied_results, "PP 2")
