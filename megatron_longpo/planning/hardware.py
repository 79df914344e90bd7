"""What GPUs and their links can do: vendor's peaks, and the rates that others measured on them.

Rates are stated, not fitted: `docs/performance.md` compares what follows from them with what was published.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megatron_longpo.config import ConfigError
from megatron_longpo.config.flags import nearest


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
        attention_tflops: What FlashAttention 2, the kernel of ``--transformer-impl local``, reaches on long rows,
            forward and backward.
        gpus_per_node: GPUs that share NVLink.
    """

    name: str
    peak_tflops: float
    mem_gib: float
    mem_gbs: float
    nvlink_gbs: float
    network_gbs: float
    matmul_tflops: float
    attention_tflops: tuple[float, float]
    gpus_per_node: int = 8

    def with_rates(self, matmul_tflops: float | None, attention_tflops: list[float] | None) -> GPU:
        """The GPU with measured rates in place of the table's."""
        matmul = matmul_tflops or self.matmul_tflops
        attention = (attention_tflops[0], attention_tflops[1]) if attention_tflops else self.attention_tflops
        return dataclasses.replace(self, matmul_tflops=matmul, attention_tflops=attention)


H100 = GPU("h100-80gb", 989, 79.6, 3350, 450, 50, 794.5, (370, 322))
A100 = GPU("a100-80gb", 312, 79.2, 2039, 300, 25, 271.2, (225, 170))

GPUS: dict[str, GPU] = {
    gpu.name: gpu
    for gpu in (
        H100,
        dataclasses.replace(H100, name="h200-141gb", mem_gib=139.8, mem_gbs=4800),
        A100,
        # The A100 for China: the same chip with two thirds of its NVLink.
        dataclasses.replace(A100, name="a800-80gb", nvlink_gbs=200),
        # FlashAttention 2 has no Blackwell code: Hopper's rates per multiprocessor and clock, 148/132 times as many.
        GPU("b200-192gb", 2250, 178.0, 8000, 900, 50, 1745, (415, 375)),
    )
}
"""Sources.

Peaks, memory, NVLink: NVIDIA's data sheets of A100, A800, H100 SXM, H200 and DGX B200 (dense, so half of the figures
with sparsity; NVLink's total is both directions, so half of that too). ``mem_gib``: the sizes that ``nvidia-smi``
shows, less than the name says. Network: one 400 Gb/s ConnectX-7 per GPU in DGX H100, H200 and B200, one 200 Gb/s
ConnectX-6 in DGX A100. ``matmul_tflops``: "maximum achievable matmul FLOPS" of stas00/ml-engineering,
compute/accelerator/README.md. ``attention_tflops``: Hopper, FlashAttention-3 (arXiv 2407.08608), Figures 5 and 6,
FlashAttention 2 at head dimension 128 and 16K tokens; A100, FlashAttention-2 (arXiv 2307.08691), section 4.1: 50-73 %
of the peak forward and up to 63 % backward, of which 72 % and 55 % are taken; Blackwell is a guess.
"""

MEASURED_LINK_SHARE = 0.8
"""Share of a link's rate that large collectives reach: NCCL's bus bandwidth of 360 GB/s of H100's 450 (nccl-tests)."""

RESERVED_GIB = 3.0
"""CUDA context, NCCL's buffers and cuBLAS workspaces, which no tensor holds."""

FRAGMENTATION_SHARE = 0.05
"""Share of the memory that PyTorch's caching allocator is expected to lose; less with expandable segments."""


def gpu_named(
    name: str,
    peak_tflops: float | None = None,
    mem_gib: float | None = None,
    link_gbs: float | None = None,
    gpus_per_node: int | None = None,
) -> GPU:
    """A GPU of the table, or one described by its numbers.

    Args:
        name: Of `GPUS`, or anything together with the three numbers that follow.
        peak_tflops, mem_gib: Replace the table's.
        link_gbs: Replaces the rate of links between nodes, and of an unknown GPU that within them too, GB/s.
        gpus_per_node: Replaces 8.

    Raises:
        ConfigError: The name is unknown, and not all three numbers are given.
    """
    numbers = {"peak_tflops": peak_tflops, "mem_gib": mem_gib, "network_gbs": link_gbs, "gpus_per_node": gpus_per_node}
    given = {field: value for field, value in numbers.items() if value is not None}
    if name in GPUS:
        return dataclasses.replace(GPUS[name], **given)  # type: ignore[arg-type]
    if peak_tflops is None or mem_gib is None or link_gbs is None:
        raise ConfigError(
            f"--gpu {name} is not known{nearest(name, GPUS)}; known: {', '.join(GPUS)}. For another one give "
            "--peak-tflops (dense bf16), --mem-gib and --link-gbs (GB/s of its network card)"
        )
    # What H100 reaches of its peak, and its ratio of memory bandwidth to peak.
    share = peak_tflops / H100.peak_tflops
    return GPU(
        name,
        peak_tflops,
        mem_gib,
        H100.mem_gbs * share,
        link_gbs,
        link_gbs,
        H100.matmul_tflops * share,
        (H100.attention_tflops[0] * share, H100.attention_tflops[1] * share),
        gpus_per_node or 8,
    )


def usable_gib(gpu: GPU) -> float:
    """Memory that tensors can fill, GiB."""
    return gpu.mem_gib * (1 - FRAGMENTATION_SHARE) - RESERVED_GIB
