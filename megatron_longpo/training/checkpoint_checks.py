"""Whether a checkpoint is one that this run can go on from, and plain words for one that cannot be written or read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from megatron_longpo.config import RunConfig
from megatron_longpo.config.flags import FLAGS
from megatron_longpo.files import failed_write
from megatron_longpo.training.checkpoint_folder import damaged, saved_flags


def check_model(checkpoint: Path, common: dict[str, Any], config: RunConfig) -> None:
    """Refuse the weights of a model of another shape.

    Args:
        checkpoint: For the message.
        common: What `common_state` reads from it.
        config: The run.

    Raises:
        ValueError: The message names the flags that differ.
    """
    saved = saved_flags(common)
    names = [key for key, spec in FLAGS.items() if spec.group == "model" and not spec.info.changeable]
    if different := _differing(names, saved, config):
        raise ValueError(f"{checkpoint} is a checkpoint of another model: {different}")


def check_optimizer(checkpoint: Path, common: dict[str, Any], config: RunConfig) -> None:
    """Refuse a checkpoint without the optimizer's state, or with that of one that keeps other tensors.

    Args:
        checkpoint: For the message.
        common: As of `check_model`.
        config: The run.

    Raises:
        ValueError: The message names the fix.
    """
    if "optimizer" not in common:
        raise ValueError(
            f"{checkpoint} holds no optimizer state: give --no-load-optim to start with a fresh optimizer, or it "
            "as --pretrained-checkpoint to start from its weights at step 0"
        )
    names = ["optimizer", "use_distributed_optimizer"]
    if not config.parallel.use_distributed_optimizer:
        names.append("bf16")  # the distributed optimizer has fp32 weights of its own either way
    if different := _differing(names, saved_flags(common), config):
        raise ValueError(
            f"{checkpoint} holds the state of another kind of optimizer: {different}. Give what the checkpoint was "
            "written with, or --no-load-optim to start with a fresh optimizer"
        )


def check_random_states(checkpoint: Path, common: dict[str, Any]) -> None:
    """Refuse a checkpoint that was written without random states.

    Args:
        checkpoint: For the message.
        common: As of `check_model`.

    Raises:
        ValueError: The message names the fix.
    """
    if saved_flags(common).get("no_save_rng"):
        raise ValueError(f"{checkpoint} holds no random states: give --no-load-rng to start with those of --seed")


def _differing(names: list[str], saved: dict[str, Any], config: RunConfig) -> str:
    """The flags whose saved values are others, in words."""
    ours = config.to_flat_dict()
    return "; ".join(
        f"{FLAGS[name].flag} is {ours[name]}, the checkpoint's is {saved[name]}"
        for name in names
        if name in saved and saved[name] != ours[name]
    )


@contextlib.contextmanager
def clear_failure(place: object) -> Iterator[None]:
    """Say what a failed write means; torch's exception for it is a BaseException, which handlers would not see.

    Args:
        place: The checkpoint, for the message.

    Raises:
        OSError: It could not be written.
    """
    try:
        yield
    except (CheckpointException, RuntimeError) as error:
        causes = failed_write(error) if isinstance(error, RuntimeError) else _causes(error)
        if causes is None:
            raise
        raise OSError(
            f"the checkpoint {place} could not be written: {causes}. Earlier checkpoints are as they were; "
            "make room or choose another --save, then resume with --load"
        ) from error


@contextlib.contextmanager
def clear_damage(checkpoint: Path) -> Iterator[None]:
    """Say which checkpoint cannot be read, as `clear_failure` does.

    Args:
        checkpoint: For the message.

    Raises:
        ValueError: Something in it is missing or broken.
    """
    try:
        yield
    except CheckpointException as error:
        raise ValueError(damaged(checkpoint, _causes(error))) from error


def _causes(error: CheckpointException) -> str:
    # Megatron's own messages may list every tensor of a checkpoint.
    causes = (failed_write(cause) or str(cause)[:300] or type(cause).__name__ for cause, _ in error.failures.values())
    return "; ".join(sorted(set(causes)))
