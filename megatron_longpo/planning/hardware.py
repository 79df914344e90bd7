"""What GPUs and their links can do: vendor's peaks, and the rates that others measured on them.

Rates are stated, not fitted: `docs/performance.md` compares what follows from them with what was published.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megatron_longpo.config import ConfigError
from megatron_longpo.config.field import AUTO
from megatron_longpo.config.flags import nearest
from megatron_longpo.config.training import FLASH, FLASH3, FUSED


@dataclass(frozen=True)
class GPU:
    """One GPU and its links.

    Args:
        name: As ``--gpu`` takes it.
        peak_tflops: Dense bf16 tensor-core peak, TFLOP/s.
        mem_gib: Memory that CUDA reports, GiB.
        mem_gbs: Memory bandwidth, GB/s.
        nvlink_gbs: To the other GPUs of its node, GB/s in each direction.
        network_gbs: Of its network card, GB/s in each direction: one card per GPU.
        matmul_tflops: What large bf16 matrix products reach.
        attention_tflops: What FlashAttention 2 reaches on long rows, forward and backward.
        host_link_gbs: PCIe to the host, GB/s in each direction.
        host_gib: Memory of the host, its share for one GPU, GiB.
        host_mem_gbs: Bandwidth of the host's memory, its share for one GPU, GB/s.
        gpus_per_node: GPUs that share NVLink.
        other_attention_tflops: What the other values of ``--attention-backend`` reach; None where nothing is known, and
            the rates of FlashAttention 2 stand for them.
        backends: Values of ``--attention-backend`` whose kernels run on it: FlashAttention 3 is for Hopper alone.
        default_backend: What ``auto`` stands for on it (`platform.default_attention_backend`).
    """

    name: str
    peak_tflops: float
    mem_gib: float
    mem_gbs: float
    nvlink_gbs: float
    network_gbs: float
    matmul_tflops: float
    attention_tflops: tuple[float, float]
    host_link_gbs: float
    host_gib: float
    host_mem_gbs: float
    gpus_per_node: int = 8
    other_attention_tflops: tuple[float, float] | None = None
    backends: tuple[str, ...] = (FLASH, FUSED, FLASH3)
    default_backend: str = FLASH

    def refuse_backend(self, backend: str) -> None:
        """Raise ConfigError where a value of ``--attention-backend`` has no kernel for this GPU."""
        if backend not in (*self.backends, AUTO):
            able = " or ".join(self.backends)
            raise ConfigError(f"--attention-backend {backend} is not for {self.name}: give --attention-backend {able}")

    def attention_rates(self, backend: str) -> tuple[float, float]:
        """TFLOP/s of attention, forward and backward, by ``--attention-backend``."""
        if backend == AUTO:
            backend = self.default_backend
        return self.attention_tflops if backend == FLASH else self.other_attention_tflops or self.attention_tflops

    def of_run(self, num_gpus: int) -> GPU:
        """The GPU as a run on this many sees it: one that does not fill a node has no other node."""
        return dataclasses.replace(self, gpus_per_node=min(self.gpus_per_node, num_gpus))

    def with_rates(self, matmul_tflops: float | None, attention_tflops: list[float] | None) -> GPU:
        """The GPU with measured rates in place of the table's."""
        matmul = matmul_tflops or self.matmul_tflops
        rated = dataclasses.replace(self, matmul_tflops=matmul)
        if not attention_tflops:
            return rated
        forward, backward = attention_tflops
        return dataclasses.replace(rated, attention_tflops=(forward, backward), other_attention_tflops=None)


H100 = GPU(
    "h100-80gb",
    peak_tflops=989,
    mem_gib=79.1,
    mem_gbs=3350,
    nvlink_gbs=450,
    network_gbs=50,
    matmul_tflops=794.5,
    attention_tflops=(370, 322),
    other_attention_tflops=(595, 516),
    default_backend=FUSED,
    host_link_gbs=63,
    host_gib=256,
    host_mem_gbs=70,
)
A100 = GPU(
    "a100-80gb",
    peak_tflops=312,
    mem_gib=79.1,
    mem_gbs=2039,
    nvlink_gbs=300,
    network_gbs=25,
    matmul_tflops=267.9,
    attention_tflops=(225, 170),
    other_attention_tflops=(199, 135),
    backends=(FLASH, FUSED),
    host_link_gbs=31.5,
    host_gib=256,
    host_mem_gbs=51,
)
B200 = GPU(
    "b200-192gb",
    peak_tflops=2250,
    mem_gib=178.3,
    mem_gbs=8000,
    nvlink_gbs=900,
    network_gbs=50,
    matmul_tflops=1745,
    attention_tflops=(412, 347),
    other_attention_tflops=(1330, 1024),
    backends=(FLASH, FUSED),
    host_link_gbs=63,
    host_gib=256,
    host_mem_gbs=70,
)

GPUS: dict[str, GPU] = {
    gpu.name: gpu
    for gpu in (
        H100,
        dataclasses.replace(H100, name="h200-141gb", mem_gib=139.7, mem_gbs=4800),
        A100,
        # The A100 for China: the same chip with two thirds of its NVLink.
        dataclasses.replace(A100, name="a800-80gb", nvlink_gbs=200),
        B200,
    )
}
"""Sources, all of the SXM modules with eight in a node.

``peak_tflops``, ``mem_gbs``, ``nvlink_gbs``: data sheets of A100 80GB (312 TFLOP/s, 2,039 GB/s, NVLink 600 GB/s), H100
(1,979 with sparsity, so 989 dense; 3.35 TB/s; 900 GB/s), H200 (the same, 4.8 TB/s), and HGX B200 (4,500 with
sparsity; 8 TB/s; 14.4 TB/s of NVLink over eight). NVLink's figures are both directions, so half of them. A800: NVLink
400 GB/s in place of 600, the rest as the A100 (NVIDIA to Reuters, November 2022).
``mem_gib``: "total capacity" in PyTorch's out-of-memory messages, which is less than the name says; it differs a little
by driver, and the smaller is taken (79.1-79.3, 139.7-139.8, 178.35). B200 has 192 GB on its module, of which 180 are
switched on in DGX B200.
``network_gbs``: one 400 Gb/s ConnectX-7 per GPU in DGX H100, H200 and B200, one 200 Gb/s ConnectX-6 in DGX A100 (their
user guides).
``matmul_tflops``: "Maximum Achievable Matmul FLOPS" of stas00/ml-engineering, compute/accelerator/README.md.
``attention_tflops``: Hopper, FlashAttention-3 (arXiv 2407.08608), Figures 5 and 6, FlashAttention 2 at head dimension
128 and 16K tokens; A100, FlashAttention-2 (arXiv 2307.08691), section 4.1: 50-73 % of the peak forward and up to 63 %
backward, of which 72 % and 55 % are taken; B200, NVIDIA/cudnn-frontend, benchmark/sdpa_benchmark_training, torch 2.8's
FlashAttention at 128K tokens with 128 heads, which has no code of its own for Blackwell.
``other_attention_tflops``: Hopper, cuDNN in the same figures of FlashAttention-3, whose own curve is a little above;
B200, torch's cuDNN (9.10) beside the above; A100, the rates above times what cuDNN reaches of FlashAttention 2 on the
PCIe card (176 of 199 forward, 143 of 180 backward: the same repository's benchmark/attention_training, September 2026).
``host_link_gbs``: PCIe Gen5 x16, 504 GB/s for eight GPUs in NVIDIA's MLPerf submission (inference v4.1,
H200-SXM-141GBx8); Gen4 x16 half of it (A100's data sheet).
``host_gib``: 2 TB for eight GPUs in DGX A100 (640 GB), H100, H200 and B200 (user guides).
``host_mem_gbs``: two sockets for eight GPUs, of eight channels each: DDR5 at 4,400 MT/s, the rate of Xeon's fourth
generation with two modules a channel, as DGX H100's 32 modules are; DDR4-3200 of EPYC 7742. B200, assumed as H100.
"""

MEASURED_LINK_SHARE = 0.8
"""Share of a link's rate that large collectives reach: NCCL's bus bandwidth of 360 GB/s of H100's 450 (nccl-tests)."""

RESERVED_GIB = 3.0
"""CUDA context, NCCL's buffers and cuBLAS workspaces, which no tensor holds."""

USABLE_HOST_SHARE = 0.75
"""Share of the host's memory that tensors may take; assumed: system, data and checkpoints need some too."""

FRAGMENTATION_SHARE = 0.05
"""Share of the memory that PyTorch's caching allocator is expected to lose; less with expandable segments."""


def gpu_named(
    name: str,
    peak_tflops: float | None = None,
    mem_gib: float | None = None,
    link_gbs: float | None = None,
    gpus_per_node: int | None = None,
    host_link_gbs: float | None = None,
    host_gib: float | None = None,
) -> GPU:
    """A GPU of the table, or one described by its numbers.

    Args:
        name: Of `GPUS`, or anything together with the three numbers that follow.
        peak_tflops, mem_gib: Replace the table's.
        link_gbs: Replaces the rate of links between nodes, and of an unknown GPU that within them too, GB/s.
        gpus_per_node: Replaces 8.
        host_link_gbs, host_gib: Replace the table's, of an unknown GPU those of an H100.

    Raises:
        ConfigError: The name is unknown, and not all three numbers are given.
    """
    numbers = {
        "peak_tflops": peak_tflops,
        "mem_gib": mem_gib,
        "network_gbs": link_gbs,
        "gpus_per_node": gpus_per_node,
        "host_link_gbs": host_link_gbs,
        "host_gib": host_gib,
    }
    given = {field: value for field, value in numbers.items() if value is not None}
    if name in GPUS:
        return dataclasses.replace(GPUS[name], **given)  # type: ignore[arg-type]
    if peak_tflops is None or mem_gib is None or link_gbs is None:
        meant = [known for known in GPUS if known.startswith(name.lower())]
        hint = f"; did you mean {meant[0]}?" if meant else nearest(name.lower(), GPUS)
        raise ConfigError(
            f"--gpu {name} is not known{hint}; known: {', '.join(GPUS)}. Another one takes tools/plan_run.py with "
            "--peak-tflops (dense bf16), --mem-gib and --link-gbs (GB/s of its network card)"
        )
    # What H100 reaches of its peak, its ratio of memory bandwidth to peak, and its host.
    share = peak_tflops / H100.peak_tflops
    return dataclasses.replace(
        H100,
        name=name,
        mem_gbs=H100.mem_gbs * share,
        nvlink_gbs=link_gbs,
        matmul_tflops=H100.matmul_tflops * share,
        attention_tflops=(H100.attention_tflops[0] * share, H100.attention_tflops[1] * share),
        other_attention_tflops=None,
        default_backend=FLASH,
        **given,  # type: ignore[arg-type]
    )


def usable_gib(gpu: GPU) -> float:
    """Memory that tensors can fill, GiB."""
    return max(0.0, gpu.mem_gib * (1 - FRAGMENTATION_SHARE) - RESERVED_GIB)


def usable_host_gib(gpu: GPU) -> float:
    """Host memory that the tensors of one GPU can fill, GiB."""
    return gpu.host_gib * USABLE_HOST_SHARE
