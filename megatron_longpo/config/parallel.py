"""How the work is spread over ranks."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_longpo.config.field import AUTO, above, equals, flag, given

HIERARCHICAL = "a2a+p2p"
CP_COMM_TYPES = ("all_gather", "a2a", "p2p", HIERARCHICAL)
"""Values of ``--cp-comm-type``."""


@dataclass(frozen=True)
class ParallelConfig:
    """Tensor, pipeline, context and data parallelism."""

    tensor_model_parallel_size: int = flag(1, "ranks that share every layer's weights", unit="ranks", at_least=1)
    pipeline_model_parallel_size: int = flag(1, "pipeline stages", unit="ranks", at_least=1)
    num_layers_per_virtual_pipeline_stage: int | None = flag(
        None,
        "interleaved 1F1B schedule: layers of one virtual stage",
        unit="layers",
        at_least=1,
        needs=above("pipeline_model_parallel_size", 1),
        default_text="plain 1F1B",
    )
    context_parallel_size: int = flag(1, "ranks that share every row's tokens", unit="ranks", at_least=1)
    cp_comm_type: str = flag(
        "all_gather",
        "exchange of keys and values: gathered per layer, sequence swapped for heads (Ulysses), passed around a ring "
        "behind the computation, or swapped among neighbours with a ring between them",
        choices=CP_COMM_TYPES,
        needs=above("context_parallel_size", 1),
    )
    hierarchical_context_parallel_sizes: tuple[int, ...] | None = flag(
        None,
        "ranks that swap sequence for heads (neighbours, in one node), and ranks of a ring; their product is the "
        "context-parallel size",
        unit="ranks",
        at_least=2,
        needs=equals("cp_comm_type", HIERARCHICAL),
        default_text="required with a2a+p2p",
    )
    sequence_parallel: bool = flag(
        False, "split norms and residuals along the row over TP", needs=above("tensor_model_parallel_size", 1)
    )
    use_distributed_optimizer: bool = flag(False, "ZeRO-1: shard optimizer state over data and context parallel ranks")
    overlap_grad_reduce: bool = flag(False, "reduce gradients while the backward pass runs")
    overlap_param_gather: bool = flag(
        False,
        "gather updated weights while the next forward pass runs",
        needs=(given("use_distributed_optimizer"), given("overlap_grad_reduce")),
    )
    distributed_backend: str = flag(
        AUTO,
        "collectives library",
        choices=(AUTO, "nccl", "gloo"),
        default_text="auto (nccl with CUDA, else gloo)",
    )
    distributed_timeout_minutes: int = flag(10, "give up on a collective after this long", unit="minutes", at_least=1)

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model and one row: TP * PP * CP."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    def data_parallel_size(self, world_size: int) -> int:
        """Number of rows computed at the same time."""
        return world_size // self.model_parallel_size

    @property
    def row_multiple(self) -> int:
        """`RowLayout.row_multiple`: a row splits over CP and, with sequence parallel, again over TP."""
        return self.context_parallel_size * (self.tensor_model_parallel_size if self.sequence_parallel else 1)
