"""Where weights come from and go to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_longpo.config.field import absent, flag, given

_LOAD = given("load")
_SAVE = given("save")


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints to start from, to resume and to write."""

    save: str | None = flag(None, "folder to write checkpoints to", unit="folder", default_text="none is written")
    load: str | None = flag(None, "folder of a checkpoint to resume", unit="folder", default_text="none")
    pretrained_checkpoint: str | None = flag(
        None,
        "folder of a checkpoint whose weights to start from when --load holds none yet",
        needs=absent("load_hf"),
        unit="folder",
        default_text="none",
    )
    load_hf: str | None = flag(
        None,
        "folder of a Hugging Face checkpoint: model shape, and weights when --load holds none yet",
        needs=absent("pretrained_checkpoint"),
        unit="folder",
        default_text="none",
        source="ours",
    )
    save_interval: int | None = flag(
        None, "steps between checkpoints", unit="steps", at_least=1, needs=_SAVE, default_text="only at the end"
    )
    save_retain_interval: int | None = flag(
        None,
        "steps between checkpoints that are kept for good, a multiple of --save-interval; of the others of this run "
        "the newest is kept",
        unit="steps",
        at_least=1,
        needs=given("save_interval"),
        default_text="all are kept",
    )
    async_save: bool = flag(False, "write checkpoints in the background", needs=_SAVE)
    ckpt_format: str = flag(
        "torch_dist", "format of checkpoints", choices=("torch_dist",), why="it loads at any TP, PP and DP size"
    )
    no_save_optim: bool = flag(False, "leave the optimizer's state out of checkpoints", needs=_SAVE)
    no_save_rng: bool = flag(False, "leave random states out of checkpoints", needs=_SAVE)
    no_load_optim: bool = flag(False, "start with a fresh optimizer", needs=_LOAD)
    no_load_rng: bool = flag(False, "start with random states by --seed", needs=_LOAD)
    finetune: bool = flag(
        False,
        "load weights only and count from step 0, each time; --pretrained-checkpoint does so once",
        needs=_LOAD,
    )
    use_checkpoint_args: bool = flag(
        False, "take the model's shape from the checkpoint", needs=given("load", "pretrained_checkpoint")
    )

    @property
    def gives_model(self) -> bool:
        """Whether the model's shape is read from a checkpoint."""
        return self.load_hf is not None or self.use_checkpoint_args

    @property
    def load_equals_save(self) -> bool:
        """Whether one folder is read and written, so that the same command starts a run and goes on with it."""
        if self.load is None or self.save is None:
            return False
        return Path(self.load).resolve() == Path(self.save).resolve()
