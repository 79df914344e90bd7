"""A folder of checkpoints: its names, which checkpoint is the newest, and what configuration one records.

    SAVE/latest_checkpointed_iteration.txt      "10"
    SAVE/iter_0000010/                          weights, optimizer, schedule, random states, progress
    SAVE/iter_0000010/run.yaml                  the resolved configuration; --config reads it

The names are Megatron-LM's, the last one aside.
"""

from __future__ import annotations

import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing, safe_globals
from torch.distributed.checkpoint.api import CheckpointException

from megatron_longpo.config import RunConfig
from megatron_longpo.config.flags import FLAGS

TRACKER = "latest_checkpointed_iteration.txt"
RUN_FILE = "run.yaml"
RELEASE = "release"
"""Megatron-LM's name for a checkpoint that no training step made."""

OF_REFERENCE = ("reference_rotary_base", "reference_window_size")
"""Flags by which the reference model may differ from the policy; a run that resumes keeps them."""


def iteration_folder(folder: str | Path, iteration: int) -> Path:
    """Where a step's checkpoint lies."""
    return Path(folder) / f"iter_{iteration:07d}"


def iteration_of(checkpoint: Path) -> int | None:
    """The step of a checkpoint, by its folder's name; None for one that no step made."""
    name, _, number = checkpoint.name.partition("_")
    return int(number) if name == "iter" and number.isdigit() else None


def find_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint that a folder's tracker names, the folder itself if it is one, or None if it holds none.

    Without a tracker it is the newest: a kill may come between a first checkpoint and the tracker.

    Raises:
        ValueError: The tracker is broken, or names a checkpoint that is not there or damaged.
    """
    folder = Path(folder)
    if is_checkpoint(folder):
        return folder
    tracker = folder / TRACKER
    if not tracker.exists():
        # A checkpoint of ours has its name when it is whole, and Megatron's metadata.json comes last.
        whole = [path for path in folder.glob("iter_*") if iteration_of(path) is not None and is_checkpoint(path)]
        return max(whole, key=lambda path: iteration_of(path) or 0, default=None)
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if text == RELEASE:
        found = folder / RELEASE
    elif text.isascii() and text.isdigit():
        found = iteration_folder(folder, int(text))
    else:
        raise ValueError(f"{tracker}: expected an iteration number or {RELEASE!r}, got {text!r}")
    if not is_checkpoint(found):
        raise ValueError(
            f"{tracker} names {found.name}, but {found} is not a torch_dist checkpoint; write the iteration of a "
            f"complete iter_* folder into {tracker.name}"
        )
    return found


def remove_remains(folder: str | Path) -> None:
    """Remove what runs leave in a folder that were killed, or found the disk full, while they saved or removed."""
    for stale in (*Path(folder).glob(".iter_*.partial"), *Path(folder).glob(".iter_*.removed")):
        shutil.rmtree(stale, ignore_errors=True)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a ``torch_dist`` checkpoint.

    Raises:
        ValueError: It is a damaged one.
    """
    try:
        return dist_checkpointing.check_is_distributed_checkpoint(str(folder))
    except (ValueError, TypeError) as error:
        raise ValueError(damaged(folder, f"metadata.json: {error}")) from error


def common_state(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint holds besides tensors and the states of single ranks.

    Raises:
        ValueError: It is damaged.
    """
    safe_globals.register_safe_globals()
    try:
        return dist_checkpointing.load_common_state_dict(str(checkpoint))
    except OSError:
        raise
    # What a damaged pickle asks for may fail with an error of any type.
    except (Exception, CheckpointException) as error:  # the second is a BaseException
        missing = not (checkpoint / "common.pt").exists()
        problem = "it is missing" if missing else str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(damaged(checkpoint, f"common.pt: {problem}")) from error


def damaged(checkpoint: Path, problem: str) -> str:
    """Say of a checkpoint that cannot be loaded what to do."""
    return (
        f"{checkpoint} cannot be loaded: {problem}. If it is damaged, write the iteration of an earlier one into "
        f"{checkpoint.parent / TRACKER}, or give it as --load"
    )


def saved_config(checkpoint: Path) -> RunConfig:
    """Model, and the reference's RoPE base and window, as this trainer recorded them (``--use-checkpoint-args``).

    Raises:
        ValueError: The checkpoint was written by another program, or is damaged.
    """
    saved = saved_flags(common_state(checkpoint))
    wanted = {key for key, spec in FLAGS.items() if spec.group == "model"} | set(OF_REFERENCE)
    values = {key: saved[key] for key in wanted if key in saved}
    if "hidden_size" not in values:
        raise ValueError(
            f"{checkpoint} does not record its model's shape, as those of this trainer and Megatron-LM do: to train "
            "from it, give the model's flags instead of --use-checkpoint-args"
        )
    return RunConfig.from_flat_dict(values)


def saved_flags(common: dict[str, Any]) -> dict[str, Any]:
    """The flags that a checkpoint records, by key; empty where it has none.

    Args:
        common: What `common_state` reads from it.
    """
    return vars(common.get("args", Namespace()))
