"""Checks, before the first step, of where a run writes: a mistake that shows at the first checkpoint costs the run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from megatron_longpo.config import RunConfig
from megatron_longpo.config.checkpoint import CheckpointConfig
from megatron_longpo.files import check_folder_writable, check_writable, folder_lock
from megatron_longpo.metrics_file import metrics_of
from megatron_longpo.training.checkpoint_folder import RELEASE, find_checkpoint, remove_remains
from megatron_longpo.training.distributed import is_rank_0, require_shared
from megatron_longpo.training.reference import check_reference_folder

_BEGINNING = '{"iteration"'
"""How every line of metrics begins."""


@contextmanager
def own_outputs(config: RunConfig) -> Iterator[None]:
    """Check what a run writes, and keep other runs out of its folder of checkpoints while the block runs.

    Remains of killed runs go from there.

    Raises:
        ValueError: As `check_outputs`; nodes do not share ``--save``; another run writes there.
    """
    check_outputs(config)
    save = config.checkpoint.save
    if save is not None:
        require_shared(save, "--save")
    complaint = f"--save {save}: another run is writing its checkpoints there; wait for it, or give another folder"
    with folder_lock(save, complaint) if save is not None and is_rank_0() else nullcontext():
        if save is not None and is_rank_0():
            remove_remains(save)  # a run that has made all its steps saves no more, and never would
        yield


def check_outputs(config: RunConfig) -> None:
    """Refuse outputs that cannot be written, or that hold what the run would destroy. Creates missing folders.

    Every rank looks at the folder of checkpoints, rank 0 at what it alone writes.

    Raises:
        ValueError: The message names flag, place and fix.
    """
    save = config.checkpoint.save
    if save is not None:
        check_folder_writable(save, "--save")
        _refuse_other_run(config.checkpoint)
    settings = config.logging
    if settings.profile_dir is not None:
        check_folder_writable(settings.profile_dir, "--profile-dir")
    if not is_rank_0():
        return
    if config.objective.needs_reference:
        check_reference_folder(config)
    if settings.tensorboard_dir is not None:
        check_folder_writable(settings.tensorboard_dir, "--tensorboard-dir")
    if settings.metrics_jsonl is not None:
        check_writable(settings.metrics_jsonl, "--metrics-jsonl", "metrics.jsonl")
        _refuse_other_content(Path(settings.metrics_jsonl))
    if settings.wandb_project is not None:
        if settings.wandb_save_dir is not None:
            check_folder_writable(settings.wandb_save_dir, "--wandb-save-dir")
        try:
            import wandb  # noqa: F401
        except ImportError as error:
            raise ValueError("--wandb-project needs wandb: pip install 'megatron_longpo[wandb]'") from error


def _refuse_other_run(settings: CheckpointConfig) -> None:
    save, load = settings.save, settings.load
    assert save is not None
    found = find_checkpoint(save)
    if found is None or found.name == RELEASE:
        return
    # A checkpoint of the folder may be named itself: a run goes on from an earlier step.
    goes_on = load is not None and Path(save).resolve() in (Path(load).resolve(), Path(load).resolve().parent)
    if goes_on and not settings.finetune:
        return
    fix = f"give --load {save} too"
    if settings.finetune:
        fix = f"give --pretrained-checkpoint {load} --load {save} in place of --load {load} --finetune"
    raise ValueError(
        f"--save {save} holds the checkpoints of another run (the newest is {found.name}), which this one would "
        f"replace: {fix} to go on with it, or another folder"
    )


def _refuse_other_content(path: Path) -> None:
    """Refuse a file with lines that are no metrics: they would be removed when it is opened."""
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            # A killed run leaves half a line at the end, and a power cut the rest of it as zeros.
            is_half = not line.endswith("\n") and _BEGINNING.startswith(line.rstrip("\0")[: len(_BEGINNING)])
            if not is_half and metrics_of(line) is None:
                raise ValueError(
                    f"--metrics-jsonl {path} is no file of metrics (see its line {number}) and would be overwritten: "
                    "give another name"
                )
