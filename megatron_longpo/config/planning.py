"""Looking before starting."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_longpo.config.field import flag, given

_DRY_RUN = given("dry_run")


@dataclass(frozen=True)
class PlanningConfig:
    """Dry run."""

    dry_run: bool = flag(
        False, "print the peak memory of these flags, measured without GPUs, and exit; needs no data", source="ours"
    )
    num_gpus: int | None = flag(
        None, "ranks of the run", unit="GPUs", at_least=1, needs=_DRY_RUN, default_text="torchrun's", source="ours"
    )
    gpu: str | None = flag(
        None,
        "GPU whose memory must suffice: h100-80gb, h200-141gb, a100-80gb, a800-80gb or b200-192gb",
        unit="name",
        needs=_DRY_RUN,
        default_text="none",
        source="ours",
    )
