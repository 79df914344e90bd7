"""What rank 0 reports: console lines in Megatron's style, a progress bar, JSON lines, TensorBoard, wandb."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_longpo.config import LoggingConfig, RunConfig
from megatron_longpo.files import atomic_writer, file_named
from megatron_longpo.metrics_file import line_of, metrics_of

WANDB_ID = "wandb_run_id.txt"
"""In ``--save``: the wandb run that a resumed run goes on with."""

_OF_LAST_STEP = ("learning_rate", "peak_memory_gib")
_RATES = ("tokens_per_s_per_gpu", "tflops_per_gpu")


def interval_means(steps: Sequence[tuple[dict[str, float], bool]]) -> dict[str, float]:
    """What a report says of the steps since the last one.

    The mean of losses and norms over the steps that were not skipped, whose values are not finite; the mean of times,
    and rates of the whole interval, over all of them; learning rate and peak of memory as after the last.

    Args:
        steps: Of each step its metrics, and whether it was skipped.
    """
    every = [metrics for metrics, _ in steps]
    applied = [metrics for metrics, skipped in steps if not skipped] or every
    seconds = sum(step["iteration_time_s"] for step in every)

    def value(name: str) -> float:
        if name in _OF_LAST_STEP:
            return every[-1][name]
        if name in _RATES:
            return sum(step[name] * step["iteration_time_s"] for step in every) / seconds
        counted = every if name.endswith("_time_s") else applied
        return sum(step[name] for step in counted) / len(counted)

    return {name: value(name) for name in every[-1]}


class Reporter:
    """Writes metrics; silent on all ranks but 0.

    Args:
        config: The run.
        active: Whether this is rank 0.
        total_steps: Length of the run.
        first_step: Steps that are done already. Lines of a killed run beyond it are removed from the metrics file, so
            that every step stands there once; with ``--skip-train`` none are, as no step is made again.
    """

    def __init__(self, config: RunConfig, active: bool, total_steps: int, first_step: int) -> None:
        settings = config.logging
        self.active, self.total_steps = active, total_steps
        self.jsonl: Any = None
        self.tensorboard: Any = None
        self.wandb: Any = None
        self.bar: tqdm[Any] | None = None
        if not active:
            return
        trains = not config.training.skip_train
        if settings.metrics_jsonl:
            self.jsonl = _open_metrics(Path(settings.metrics_jsonl), first_step if trains else math.inf)
        if settings.tensorboard_dir:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(settings.tensorboard_dir, purge_step=first_step + 1 if trains else None)
        if settings.wandb_project:
            self.wandb = _start_wandb(settings, config, first_step)
        wanted = settings.progress_bar == "on" or (settings.progress_bar == "auto" and sys.stderr.isatty())
        if wanted and trains:
            self.bar = tqdm(total=total_steps, initial=first_step, desc="training", unit="step", dynamic_ncols=True)

    def print(self, text: str) -> None:
        """One line on the console, above the progress bar."""
        if not self.active:
            return
        if self.bar is not None:
            tqdm.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def step_done(self) -> None:
        """Move the progress bar by one step."""
        if self.bar is not None:
            self.bar.update()

    def report(self, metrics: dict[str, float], prefix: str = "") -> None:
        """Write one step's metrics everywhere.

        Args:
            metrics: Values by name; must hold ``iteration``.
            prefix: ``"eval/"`` for evaluation, empty for training.
        """
        if not self.active:
            return
        step = int(metrics["iteration"])
        counters = ("iteration", "consumed_samples")
        named = {(k if k in counters else prefix + k): v for k, v in metrics.items()}
        if self.jsonl is not None:
            with file_named(self.jsonl.name):
                self.jsonl.write(line_of(named) + "\n")
                self.jsonl.flush()
        if self.tensorboard is not None:
            with file_named(self.tensorboard.log_dir):
                for name, value in named.items():
                    self.tensorboard.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(named, step=step)
        self.print(_line(metrics, self.total_steps, prefix))
        if self.bar is not None and not prefix:
            self.bar.set_postfix_str(f"loss {metrics['loss']:.4f}")

    def close(self) -> None:
        """Flush and close everything."""
        if self.bar is not None:
            self.bar.close()
        if self.jsonl is not None:
            with file_named(self.jsonl.name):  # what could not be written is written again
                self.jsonl.close()
        if self.tensorboard is not None:
            with file_named(self.tensorboard.log_dir):
                self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()


_SHORT = {
    "loss": ("loss", "{:.6E}"),
    "longpo/preference_loss": ("preference", "{:.4f}"),
    "longpo/nll_loss": ("nll", "{:.4f}"),
    "longpo/kl": ("kl", "{:.4f}"),
    "rewards/margins": ("margin", "{:+.4f}"),
    "rewards/accuracies": ("accuracy", "{:.3f}"),
    "learning_rate": ("learning rate", "{:.3E}"),
    "grad_norm": ("grad norm", "{:.3f}"),
    "tokens_per_s_per_gpu": ("tokens/s/GPU", "{:,.0f}"),
    "tflops_per_gpu": ("TFLOP/s/GPU", "{:.1f}"),
    "iteration_time_s": ("time per step (s)", "{:.2f}"),
    "peak_memory_gib": ("peak GiB", "{:.2f}"),
}


def _line(metrics: dict[str, float], total_steps: int, prefix: str) -> str:
    head = "evaluation at iteration" if prefix else " iteration"
    parts = [f"{head} {int(metrics['iteration']):8d}/{total_steps:8d}"]
    if not prefix:
        parts.append(f"consumed samples: {int(metrics['consumed_samples']):9d}")
    parts += [f"{short}: {form.format(metrics[name])}" for name, (short, form) in _SHORT.items() if name in metrics]
    if metrics.get("skipped_steps"):
        parts.append(f"skipped steps: {int(metrics['skipped_steps'])}")
    return " | ".join(parts)


def _open_metrics(path: Path, first_step: float) -> Any:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        # The last line of a killed run may be half a line.
        rows = filter(None, map(metrics_of, path.read_text(encoding="utf-8", errors="replace").splitlines()))
        kept = [line_of(row) for row in rows if row["iteration"] <= first_step]
        with atomic_writer(path) as file:
            file.writelines(line + "\n" for line in kept)
    return open(path, "a", encoding="utf-8")


def _start_wandb(settings: LoggingConfig, config: RunConfig, first_step: int) -> Any:
    """Start a wandb run, or go on with that of the run in ``--save``; its id lies beside the checkpoints.

    An evaluation alone is a run of its own: wandb takes no values for steps that it has.
    """
    import wandb  # `check_outputs` has found it

    checkpoint = config.checkpoint
    folder = settings.wandb_save_dir or (os.path.join(checkpoint.save, "wandb") if checkpoint.save else None)
    if folder:
        os.makedirs(folder, exist_ok=True)
    id_file = Path(checkpoint.save, WANDB_ID) if checkpoint.save and not config.training.skip_train else None
    run_id = None
    if id_file is not None and id_file.exists() and first_step > 0 and checkpoint.load_equals_save:
        run_id = id_file.read_text().strip()
    run = wandb.init(
        project=settings.wandb_project,
        entity=settings.wandb_entity,
        name=settings.wandb_exp_name,
        dir=folder,
        config=config.to_flat_dict(),
        id=run_id,
        resume="allow",
    )
    if id_file is not None:
        with atomic_writer(id_file) as file:
            file.write(run.id)
    return run
