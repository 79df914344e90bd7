"""Runs whose training step is traced, by name."""

from __future__ import annotations

from dataclasses import dataclass

from tests.tiny import MODEL_FLAGS

_RUN = [
    *("--num-layers=2", "--seq-length=256", "--train-iters=9", "--split=100,0", "--num-workers=0"),
    "--progress-bar=off",
    "--objective=dpo",  # its reference pass has the rows of training
]
_KEPT = "--recompute-granularity=full --recompute-method=uniform --recompute-num-layers=1 --recompute-keep-attention"
_STAGES = "--bf16 --global-batch-size=4 --num-layers=4 --pipeline-model-parallel-size=2"

FLASH = "_flash_attention"
CUDNN = "_scaled_dot_product_cudnn_attention"
EFFICIENT = "_scaled_dot_product_efficient_attention"
FORWARD = {FLASH: "_flash_attention_forward", CUDNN: CUDNN, EFFICIENT: EFFICIENT}
"""The operators of the forward pass; those of the backward pass end in ``_backward``."""


@dataclass(frozen=True)
class Case:
    """A run, and which of its ranks is traced.

    Args:
        words: Flags.
        kernel_calls: How often the step calls the attention kernel forward: layers, micro-batches and tiles multiplied.
        kernel: The operator.
        world_size: Ranks of the run.
        rank: The one that is traced.
        offloaded: Saved tensors that come back from host memory; None is some, and depends on how torch was built.
        synchronizations: Calls of ``torch.cuda.synchronize`` in a step, and in a forward pass alone.
    """

    words: str
    kernel_calls: int
    kernel: str = FLASH
    world_size: int = 1
    rank: int = 0
    offloaded: int | None = 0
    synchronizations: tuple[int, int] = (1, 0)

    @property
    def flags(self) -> list[str]:
        """The command line."""
        # Left to itself the kernel is cuDNN's: the device says that it is a Hopper GPU.
        backend = ["--attention-backend=flash"] if self.kernel == FLASH else []
        return [*MODEL_FLAGS, *_RUN, *self.words.split(), *backend]


# A row has 4 tiles: its prefix, both branches on the prefix, each branch.
QUICK = {
    "everything that saves memory": Case(
        f"--bf16 --global-batch-size=2 {_KEPT} --mlp-chunk-tokens=16 --projection-chunk-tokens=16 "
        "--cpu-offloading-num-layers=2 --use-distributed-optimizer",
        kernel_calls=2 * 2 * 4,
        offloaded=2 * 2,  # of the first layer its input and attention's output; the last layer's are still there
    ),
    "fp32": Case("--global-batch-size=1", kernel_calls=2 * 4, kernel=EFFICIENT),
    "tensor parallel, fused, ring": Case(
        "--bf16 --global-batch-size=1 --tensor-model-parallel-size=2 --sequence-parallel "
        "--context-parallel-size=2 --cp-comm-type=p2p",
        kernel_calls=2 * 8,
        kernel=CUDNN,
        world_size=4,
        rank=3,
    ),
    "optimizer on the host": Case(
        "--bf16 --global-batch-size=1 --use-distributed-optimizer --optimizer-cpu-offload "
        "--overlap-cpu-optimizer-d2h-h2d",
        kernel_calls=2 * 4,
    ),
}
THOROUGH = {
    "plain": Case("--bf16 --global-batch-size=2", kernel_calls=2 * 2 * 4),
    "full recomputation": Case(
        f"--bf16 --global-batch-size=1 {_KEPT.removesuffix('--recompute-keep-attention')}", kernel_calls=2 * 2 * 4
    ),
    "offload without recomputation": Case(
        "--bf16 --global-batch-size=1 --cpu-offloading-num-layers=2", kernel_calls=2 * 4, offloaded=None
    ),
    "window": Case("--bf16 --global-batch-size=1 --window-size 7,0", kernel_calls=2 * 15),
    "all_gather": Case("--bf16 --global-batch-size=1 --context-parallel-size=2", 2 * 7, world_size=2, rank=1),
    "a2a": Case("--bf16 --global-batch-size=1 --context-parallel-size=2 --cp-comm-type=a2a", 2 * 4, world_size=2),
    "a2a+p2p": Case(
        "--bf16 --global-batch-size=1 --context-parallel-size=4 --cp-comm-type=a2a+p2p "
        "--hierarchical-context-parallel-sizes 2 2",
        kernel_calls=2 * 8,
        world_size=4,
        rank=3,
    ),
    "first stage": Case(_STAGES, 2 * 4 * 4, world_size=2, rank=0, synchronizations=(6, 4)),
    "last stage": Case(_STAGES, 2 * 4 * 4, world_size=2, rank=1, synchronizations=(6, 4)),
    "interleaved": Case(
        f"{_STAGES} --num-layers-per-virtual-pipeline-stage=1",
        kernel_calls=2 * 4 * 4,
        world_size=2,
    ),
    "overlapped gradients and weights": Case(
        "--bf16 --global-batch-size=2 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
        kernel_calls=2 * 4,
        world_size=2,
    ),
    "half of the optimizer on the host": Case(
        "--bf16 --global-batch-size=1 --use-distributed-optimizer --optimizer-cpu-offload "
        "--optimizer-offload-fraction=0.5",
        kernel_calls=2 * 4,
    ),
}
