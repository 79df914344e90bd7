"""The whole GPU path of a training step, traced without a GPU on fake CUDA tensors.

Fake tensors have shapes, dtypes and devices, and no data. torch's own rules for them refuse operands on different
devices, wrong dtypes, shapes and signatures; what they let pass is asserted here.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.fake_cuda.__main__ import RATES
from tests.fake_cuda.cases import CUDNN, EFFICIENT, FLASH, FORWARD, QUICK, THOROUGH, Case
from tests.fake_cuda.library import guard_library
from tests.training.commands import REPOSITORY, environment

CASES = QUICK | THOROUGH

HOST_MEMORY = {
    "megatron_longpo/training/fused_adam.py: after_step": "step counts, where checkpoints look for them",
    "megatron_longpo/data/sending.py: sent": "micro-batches and index tensors on their way to the GPU",
    "megatron_longpo/data/layout.py": "the layout, which layers read on the host, and index tensors",
    "megatron_longpo/attention/row_order.py": "index tensors, made once per layout",
    "megatron/core/transformer/module.py: half_conversion": "the layout, on its way through the bf16 wrapper",
    "megatron/core/tensor_parallel/random.py: backward": "the layout, out of a checkpoint",
    "megatron_longpo/objective/logprobs.py: _chunks": "-inf, an argument of a kernel",
    "megatron/core/tensor_parallel/layers.py: forward": "0, an argument of a kernel",
    "autograd": "0, an argument of that kernel's gradient",
    "megatron_longpo/model/rope.py: inverse_frequencies": "made on the host, once per pass",
    "megatron_longpo/platform/transfers.py: _send": "offloaded activations",
    "megatron_longpo/platform/transfers.py: _bring_back": "offloaded activations",
    "megatron/core/pipeline_parallel/schedules.py: forward_step_calc_loss": "a count of 0 where there is no loss",
    "megatron/core/pipeline_parallel/schedules.py: forward_backward_pipelining_without_interleaving": "the same",
    "megatron/core/pipeline_parallel/schedules.py: forward_step_helper_postprocess": "the same",
    "megatron/core/optimizer/optimizer.py: step_with_ready_grads": "Adam's count of steps",
    "megatron/core/optimizer/cpu_offloading/hybrid_optimizer.py: _set_sub_optimizer_grads": "optimizer on the host",
    "megatron/core/optimizer/cpu_offloading/hybrid_optimizer.py: step": "optimizer on the host",
    "megatron/core/optimizer/cpu_offloading/hybrid_optimizer.py: param_copy_back_gpu_hook": "optimizer on the host",
    "megatron_longpo/training/loop.py: _performance": "the counts that are reported",
}
"""Functions or files that touch tensors in host memory, and what those are."""

WAITS = {
    "_local_scalar_dense in megatron/core/distributed/finalize_model_grads.py: finalize_model_grads",
    "_local_scalar_dense in megatron_longpo/training/step.py: global_batch_metrics",
    "_local_scalar_dense in megatron_longpo/training/step.py: gradients_are_finite",
    "_local_scalar_dense in megatron/core/optimizer/clip_grads.py: get_grad_norm_fp32",
    "_to_copy in megatron_longpo/training/loop.py: _performance",
    "_local_scalar_dense in megatron_longpo/training/loop.py: _performance",
}
"""Where the host waits for the GPU: in the end of a step, for numbers that decide what comes next or are reported."""


@pytest.fixture(scope="module")
def traced(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Traces runs in one process, since a process finds a GPU or none."""
    library = guard_library(request.config.cache.mkdir("fake_cuda"))

    @functools.cache
    def trace(names: tuple[str, ...]) -> dict[str, Any]:
        result = tmp_path_factory.mktemp("traces") / "found.json"
        done = subprocess.run(
            [sys.executable, "-m", "tests.fake_cuda", str(library), str(result), *names],
            cwd=REPOSITORY,
            env=environment() | {"CUDA_VISIBLE_DEVICES": "", "LONGPO_USE_CPU": ""},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"exit code {done.returncode}:\n{(done.stdout + done.stderr)[-6000:]}"
        return json.loads(result.read_text())

    return trace


@pytest.fixture(params=[*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in THOROUGH)])
def run(request: pytest.FixtureRequest, traced: Callable[..., dict[str, Any]]) -> tuple[Case, dict[str, Any]]:
    """A case, and what its trace found."""
    name = request.param
    found = traced(tuple(QUICK if name in QUICK else THOROUGH))[name]
    assert "error" not in found, found["error"]
    return CASES[name], found


def dtype_of(case: Case) -> str:
    return "bfloat16" if "--bf16" in case.words else "float32"


def unexpected_in_host_memory(found: dict[str, Any]) -> list[str]:
    return [place for place in found["on_host"] if not {place, place.split(":")[0]} & HOST_MEMORY.keys()]


def test_attention_is_the_right_kernel_called_once_per_tile(run: tuple[Case, dict[str, Any]]) -> None:
    case, found = run
    backward = 2 if "uniform" in case.words and "keep-attention" not in case.words else 1
    expected = {FORWARD[case.kernel]: case.kernel_calls, f"{case.kernel}_backward": case.kernel_calls // backward}
    assert {name: count for name, count in found["calls"].items() if "attention" in name} == expected
    ((out, lse, *_),) = found["dtypes"][FORWARD[case.kernel]]
    assert (out, lse) == (dtype_of(case), "float32")


def test_products_are_of_the_training_dtype_and_gradients_fp32(run: tuple[Case, dict[str, Any]]) -> None:
    case, found = run
    assert found["weights"] == [f"{dtype_of(case)} on cuda:0"]
    assert found["gradients"] == ["float32 on cuda:0"]
    products = {name: dtypes for name, dtypes in found["dtypes"].items() if "mm" in name.partition(".")[0]}
    # The LM head, which the first pipeline stages do not have, multiplies bf16 into fp32.
    into_fp32 = {name: [["float32"]] for name in products if name in ("mm.dtype", "mm.dtype_out")}
    assert products == {name: [[dtype_of(case)]] for name in products} | into_fp32
    has_head = "pipeline" not in case.words or case.rank > 0
    assert len(into_fp32) == (2 if has_head and "--bf16" in case.words else 0)


def test_only_what_belongs_there_is_in_host_memory(run: tuple[Case, dict[str, Any]]) -> None:
    case, found = run
    assert not unexpected_in_host_memory(found)
    offloaded = found["on_host"].get("megatron_longpo/platform/transfers.py: _bring_back", 0)
    assert offloaded == case.offloaded or (case.offloaded is None and offloaded > 0)
    on_host = any("hybrid_optimizer" in place for place in found["on_host"])
    assert on_host == ("--optimizer-cpu-offload" in case.words)


def test_streams_leave_each_other_s_memory_alone(run: tuple[Case, dict[str, Any]]) -> None:
    _, found = run
    assert not found["races"]


def test_the_host_runs_ahead_until_the_end_of_the_step(run: tuple[Case, dict[str, Any]]) -> None:
    case, found = run
    assert found["waits"].keys() <= WAITS
    assert found["synchronizations"]["torch.cuda.synchronize"] == case.synchronizations[0]
    # Not once per weight or layer. The means of a micro-batch are read one by one, after all of them are computed.
    micro_batches = 4 if "pipeline" in case.words else 2
    assert max(found["waits"].values()) <= micro_batches + 1


def test_the_reference_pass_waits_for_nothing(run: tuple[Case, dict[str, Any]]) -> None:
    case, found = run
    reference = found["reference pass"]
    assert reference["calls"][FORWARD[case.kernel]] > 0
    assert not any("backward" in name for name in reference["calls"])
    assert not unexpected_in_host_memory(reference) and reference["waits"] == {}
    assert reference["synchronizations"].get("torch.cuda.synchronize", 0) == case.synchronizations[1]


@pytest.mark.slow
def test_measurements_of_the_benchmark(traced: Callable[..., dict[str, Any]]) -> None:
    found = traced((RATES,))[RATES]
    assert "error" not in found, found["error"]
    assert all(found["calls"][FORWARD[kernel]] and found["calls"][f"{kernel}_backward"] for kernel in (FLASH, CUDNN))
    assert EFFICIENT in found["calls"] and not any("for_cpu" in name for name in found["calls"])
