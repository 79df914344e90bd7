"""What is reported, and where."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_longpo.config.field import AUTO, flag, given

_WANDB = given("wandb_project")
_PROFILE = given("profile")


@dataclass(frozen=True)
class LoggingConfig:
    """Console, metrics file, TensorBoard, wandb."""

    log_interval: int = flag(
        1,
        "steps between reports, which hold the mean over these steps (Megatron-LM: 100; steps are long here)",
        unit="steps",
        at_least=1,
    )
    progress_bar: str = flag(
        AUTO,
        "progress bar on the last line of the console",
        choices=(AUTO, "on", "off"),
        default_text="auto (on a terminal)",
        source="ours",
    )
    metrics_jsonl: str | None = flag(
        None, "file that gets one JSON line per report", unit="file", default_text="none", source="ours"
    )
    tensorboard_dir: str | None = flag(None, "folder for TensorBoard", unit="folder", default_text="none")
    profile: bool = flag(False, "write a trace of some steps, with a named range per stage, and print their shares")
    profile_step_start: int = flag(
        10, "steps before the first one in the trace", unit="steps", at_least=0, needs=_PROFILE
    )
    profile_step_end: int = flag(12, "last step in the trace", unit="step", at_least=1, needs=_PROFILE)
    profile_ranks: tuple[int, ...] = flag((0,), "ranks that write a trace", unit="rank", at_least=0, needs=_PROFILE)
    profile_dir: str | None = flag(
        None,
        "folder for traces (Megatron-LM: --tensorboard-dir)",
        unit="folder",
        needs=_PROFILE,
        default_text="SAVE/profile, or ./profile",
        source="ours",
    )
    use_pytorch_profiler: bool = flag(
        True, "mark the steps for Nsight Systems instead of writing a trace", needs=_PROFILE, default_text="a trace"
    )
    wandb_project: str | None = flag(None, "report to this wandb project", unit="name", default_text="no wandb")
    wandb_entity: str | None = flag(
        None, "wandb team or user", needs=_WANDB, unit="name", default_text="the account's own"
    )
    wandb_exp_name: str | None = flag(
        None, "name of the wandb run", needs=_WANDB, unit="name", default_text="made by wandb"
    )
    wandb_save_dir: str | None = flag(
        None, "folder for wandb's local files", needs=_WANDB, unit="folder", default_text="SAVE/wandb, or ./wandb"
    )
