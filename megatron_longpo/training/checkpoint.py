"""Checkpoints in Megatron's ``torch_dist`` format: they load at another TP, PP, CP and DP size.

A checkpoint is written to a hidden folder beside its place and renamed when it is whole; the tracker file comes last.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, safe_globals
from megatron.core.dist_checkpointing.serialization import (
    get_default_load_sharded_strategy,
    get_default_save_sharded_strategy,
)
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)

from megatron_longpo import platform
from megatron_longpo.config import RunConfig
from megatron_longpo.files import atomic_writer, sync_file, sync_folder
from megatron_longpo.model.build import unwrap
from megatron_longpo.training.checkpoint_checks import (
    check_model,
    check_optimizer,
    check_random_states,
    clear_damage,
    clear_failure,
)
from megatron_longpo.training.checkpoint_folder import (
    RUN_FILE,
    TRACKER,
    common_state,
    iteration_folder,
    iteration_of,
    remove_remains,
)
from megatron_longpo.training.distributed import is_rank_0
from megatron_longpo.training.fp8_state import scaling_factors_allowed
from megatron_longpo.training.optimizer import awaits_first_step
from megatron_longpo.training.random_state import random_state, set_random_state


@dataclasses.dataclass
class Progress:
    """Where a run is. Everything that a resumed run needs besides weights, optimizer, schedule and random states."""

    iteration: int = 0
    consumed_samples: int = 0
    skipped_steps: int = 0
    sampler: dict[str, Any] = dataclasses.field(default_factory=dict)
    reference_fingerprint: str | None = None


def _format() -> dict[str, Any]:
    """How the distributed optimizer's state is written; a new dictionary each time, since Megatron adds to it."""
    return {"distrib_optim_sharding_type": "fully_reshardable"}


class Checkpointer:
    """Saves and loads the state of one run.

    Args:
        config: The run.
        chunks: This rank's model chunks.
        optimizer: Megatron's optimizer, or None (weights only).
        scheduler: Megatron's schedule, or None.
    """

    def __init__(self, config: RunConfig, chunks: list[Any], optimizer: Any = None, scheduler: Any = None) -> None:
        self.config, self.chunks, self.optimizer, self.scheduler = config, chunks, optimizer, scheduler
        self.queue = AsyncCallsQueue()
        self.newest: Path | None = None
        """The newest checkpoint of this run in ``--save``: the one that it goes on from, then those that it wrote."""
        self.replaced: Path | None = None
        """What the one that it goes on from replaced; still there if a kill came between the two."""
        safe_globals.register_safe_globals()

    def save(self, progress: Progress) -> Path:
        """Write a checkpoint; with ``--async-save`` it is finished later, by `finish`.

        Returns:
            Where the checkpoint lies, or will.
        """
        settings = self.config.checkpoint
        assert settings.save is not None
        self.finish(blocking=True)
        final = iteration_folder(settings.save, progress.iteration)
        partial = final.with_name(f".{final.name}.partial")
        if is_rank_0():
            remove_remains(final.parent)
            partial.mkdir(parents=True)
        dist.barrier()
        state: dict[str, Any] = {
            "args": Namespace(**self.config.to_flat_dict()),
            "checkpoint_version": 3.0,
            "iteration": progress.iteration,
            "progress": dataclasses.asdict(progress),
            "parallel_sizes": _parallel_sizes(),
            "replaces": None if self.newest is None else self.newest.name,
        } | self._model_state()
        if self.optimizer is not None and not settings.no_save_optim:
            state["optimizer"] = self.optimizer.sharded_state_dict(state, is_loading=False, metadata=_format())
            state["optimizer_awaits_first_step"] = awaits_first_step(self.optimizer)
            state["opt_param_scheduler"] = self.scheduler.state_dict()
        if not settings.no_save_rng:
            state["rng_state"] = random_state()
        platform.prepare_write_results(settings.async_save)
        with clear_failure(final):
            request = dist_checkpointing.save(
                state,
                str(partial),
                _save_strategy(),
                async_sharded_save=settings.async_save,
                content_metadata=_format(),
                **platform.async_save_options(),
            )

        def publish() -> None:
            """Make the written folder the newest checkpoint; all ranks call it, with ``--async-save`` steps later."""
            if is_rank_0():
                self._publish(partial, final)
            dist.barrier()
            if is_rank_0():
                self._remove(self.replaced, final)
                self._remove(self.newest, final)
            self.newest, self.replaced = final, None

        if request is None:
            publish()
        else:
            request.add_finalize_fn(publish)
            self.queue.schedule_async_request(request)
        return final

    def finish(self, blocking: bool) -> None:
        """Complete background saves whose files are written; with ``blocking`` wait for them. All ranks call it."""
        with clear_failure(self.config.checkpoint.save):
            self.queue.maybe_finalize_async_calls(blocking=blocking)

    def load(self, checkpoint: Path, weights_only: bool = False) -> Progress:
        """Load a checkpoint written at any parallel sizes.

        Args:
            checkpoint: What `find_checkpoint` returned.
            weights_only: Leave optimizer, schedule, random states and progress as they are.

        Raises:
            ValueError: The checkpoint is of another model, or lacks what is asked for.
        """
        settings = self.config.checkpoint
        common = common_state(checkpoint)
        check_model(checkpoint, common, self.config)
        with_optimizer = self.optimizer is not None and not (weights_only or settings.no_load_optim)
        if with_optimizer:
            check_optimizer(checkpoint, common, self.config)
        with_rng = not (weights_only or settings.no_load_rng)
        if with_rng:
            check_random_states(checkpoint, common)
        with_rng = with_rng and common.get("parallel_sizes") == _parallel_sizes()
        state = self._model_state()
        # Such an optimizer has nothing to load, and makes its state in its first step as it would have.
        with_state = with_optimizer and not common.get("optimizer_awaits_first_step", False)
        if with_state:
            metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=common)
            state["optimizer"] = self.optimizer.sharded_state_dict(state, is_loading=True, metadata=metadata)
        if with_rng:
            state["rng_state"] = random_state()
        with clear_damage(checkpoint):
            loaded = dist_checkpointing.load(state, str(checkpoint), _load_strategy(checkpoint))
        for key, chunk in zip(self._chunk_keys(), self.chunks, strict=True):
            with scaling_factors_allowed(checkpoint, loaded[key]):
                unwrap(chunk).load_state_dict(loaded[key])
        if with_state:
            if self.config.optimizer.optimizer == "sgd":
                # Without momentum it has no state, and what is empty is not written.
                state = loaded["optimizer"].get("optimizer", loaded["optimizer"])
                state.setdefault("state", {})
            with _settings_kept(self.optimizer):
                self.optimizer.load_state_dict(loaded["optimizer"])
        elif self.optimizer is not None:
            self.optimizer.reload_model_params()
        if with_optimizer:
            self.scheduler.load_state_dict(loaded["opt_param_scheduler"])
        if with_rng:
            set_random_state(loaded["rng_state"])
        if weights_only:
            return Progress()
        if settings.save is not None and checkpoint.parent.resolve() == Path(settings.save).resolve():
            self.newest = checkpoint
            self.replaced = checkpoint.with_name(common["replaces"]) if common.get("replaces") else None
        known = {field.name for field in dataclasses.fields(Progress)}
        saved = common.get("progress", {"iteration": common.get("iteration", 0)})
        return Progress(**{name: value for name, value in saved.items() if name in known})

    def _publish(self, partial: Path, final: Path) -> None:
        """Give a written folder its name, then name it in the tracker, which names a whole one at any time."""
        self.config.dump_yaml(partial / RUN_FILE)
        for path in partial.iterdir():
            if path.suffix != ".distcp":  # Megatron syncs those
                sync_file(path)
        sync_folder(partial)
        if final.exists():
            # The run went on from an earlier step and comes to one that it made before, maybe the tracker's.
            if self.newest is not None:
                _track(self.newest)
            _discard(final)
        os.rename(partial, final)
        sync_folder(final.parent)
        _track(final)

    def _remove(self, old: Path | None, new: Path) -> None:
        """Remove an earlier checkpoint, unless ``--save-retain-interval`` keeps it."""
        interval = self.config.checkpoint.save_retain_interval
        number = iteration_of(old) if old is not None else None
        if interval is None or old is None or number is None or number % interval == 0 or old.name == new.name:
            return
        if old.exists():
            _discard(old)

    def _chunk_keys(self) -> list[str]:
        return ["model"] if len(self.chunks) == 1 else [f"model{i}" for i in range(len(self.chunks))]

    def _model_state(self) -> dict[str, Any]:
        return {
            key: unwrap(chunk).sharded_state_dict(metadata=_format())
            for key, chunk in zip(self._chunk_keys(), self.chunks, strict=True)
        }


def _track(checkpoint: Path) -> None:
    """Name a checkpoint in the tracker of its folder."""
    number = iteration_of(checkpoint)
    with atomic_writer(checkpoint.parent / TRACKER) as file:
        file.write(checkpoint.name if number is None else str(number))


def _discard(checkpoint: Path) -> None:
    """Remove a checkpoint under another name: half of one must not look like one."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(checkpoint, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


@contextlib.contextmanager
def _settings_kept(optimizer: Any) -> Iterator[None]:
    """Keep this run's learning rates, betas and so on: a checkpoint's parameter groups hold those of its own run."""
    state = ("params", "step")
    settings = [{name: group[name] for name in group if name not in state} for group in optimizer.param_groups]
    yield
    for group, ours in zip(optimizer.param_groups, settings, strict=True):
        group.update(ours)


def _save_strategy() -> Any:
    """Let each data-parallel rank write a part of what all of them hold, the weights."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return FullyParallelSaveStrategyWrapper(get_default_save_sharded_strategy(), group)


def _load_strategy(checkpoint: Path) -> Any:
    """Let each data-parallel rank read a part and send it to the others; their exchange needs CUDA tensors."""
    strategy = get_default_load_sharded_strategy(str(checkpoint))
    if not platform.has_cuda():
        return strategy
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return FullyParallelLoadStrategyWrapper(strategy, group)


def _parallel_sizes() -> list[int]:
    return [
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_data_parallel_world_size(with_context_parallel=True),
    ]
