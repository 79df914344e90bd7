"""Where a run's weights come from: a checkpoint to resume, else the model to start from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from megatron_longpo.config import RunConfig
from megatron_longpo.conversion.hf_config import read_hf_folder
from megatron_longpo.conversion.load import load_hf_weights
from megatron_longpo.training.checkpoint import Checkpointer, Progress
from megatron_longpo.training.checkpoint_folder import OF_REFERENCE, RELEASE, TRACKER, find_checkpoint, saved_config
from megatron_longpo.training.distributed import is_rank_0, nodes_that_differ


def with_initial_model(config: RunConfig) -> RunConfig:
    """The run with the model's shape that its checkpoint gives (``--load-hf``, ``--use-checkpoint-args``).

    Where flags give the shape, the checkpoint still says what the reference model is.
    """
    settings = config.checkpoint
    if settings.load_hf is not None:
        source = read_hf_folder(settings.load_hf)
        config = config.with_model(source.model, f"--load-hf {settings.load_hf}")
        source.family.refuse_window(config.model)
        return config
    # The model to start from comes first: its RoPE is the reference's, --load's may have been changed since.
    for folder in (settings.pretrained_checkpoint, settings.load):
        found = find_checkpoint(folder) if folder else None
        if found is not None:
            return _with_saved(config, found, resumes=folder == settings.load and not settings.finetune)
    if settings.use_checkpoint_args:
        raise ValueError(
            "--use-checkpoint-args: neither --load nor --pretrained-checkpoint holds a checkpoint; give the model's "
            "flags (--num-layers, --hidden-size, …) or --load-hf"
        )
    return config


def _with_saved(config: RunConfig, checkpoint: Path, resumes: bool) -> RunConfig:
    try:
        saved = saved_config(checkpoint)
    except ValueError:
        if config.checkpoint.use_checkpoint_args:
            raise
        return config  # of another program: flags say what the reference is
    if resumes or checkpoint.name == RELEASE:
        # A run that resumes keeps the reference that it began with, and a converted model what it was before.
        kept = {
            name: getattr(saved.objective, name) for name in OF_REFERENCE if getattr(config.objective, name) is None
        }
        config = dataclasses.replace(config, objective=dataclasses.replace(config.objective, **kept))
    if config.checkpoint.use_checkpoint_args:
        return config.with_model(saved.model, str(checkpoint))
    return config.with_reference_of(saved.model)


def load_initial_state(config: RunConfig, checkpointer: Checkpointer) -> Progress:
    """Fill the model (and optimizer) of a run that starts.

    ``--load`` wins where it holds a checkpoint, so that the same command starts and resumes a run. Otherwise weights
    come from ``--load-hf`` or ``--pretrained-checkpoint``, or stay random.

    Raises:
        ValueError: A checkpoint was asked for and is not there.
    """
    settings = config.checkpoint
    if settings.load is not None:
        found = find_checkpoint(settings.load)
        if nodes := nodes_that_differ(found):
            raise ValueError(
                f"--load {settings.load} holds another checkpoint on {', '.join(nodes)} than on the node of rank 0: "
                "give a folder on a file system that all nodes share"
            )
        if found is not None:
            progress = checkpointer.load(found, weights_only=settings.finetune)
            _tell(f"loaded {found}: the run goes on at iteration {progress.iteration}")
            return progress
        starts_elsewhere = settings.load_hf is not None or settings.pretrained_checkpoint is not None
        if not (starts_elsewhere or settings.load_equals_save):
            raise ValueError(
                f"--load {settings.load} holds no checkpoint (no {Path(settings.load) / TRACKER}); to start a run here "
                "and resume it with the same command, let --load equal --save"
            )
        _tell(f"--load {settings.load} holds no checkpoint yet: the run starts at iteration 0")
    if settings.pretrained_checkpoint is not None:
        found = find_checkpoint(settings.pretrained_checkpoint)
        if found is None:
            raise ValueError(f"--pretrained-checkpoint {settings.pretrained_checkpoint} holds no checkpoint")
        return checkpointer.load(found, weights_only=True)
    if settings.load_hf is not None:
        load_hf_weights(config, checkpointer.chunks, settings.load_hf)
        if checkpointer.optimizer is not None:
            checkpointer.optimizer.reload_model_params()
    return Progress()


def _tell(text: str) -> None:
    if is_rank_0():
        print(text, flush=True)
