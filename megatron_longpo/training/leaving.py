"""When a run must save and leave: SIGTERM, a time limit, a step limit; and what it says of itself after Ctrl-C."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from types import FrameType

import psutil

from megatron_longpo.config import CheckpointConfig, TrainingConfig
from megatron_longpo.training.checkpoint_folder import RELEASE, find_checkpoint, iteration_of
from megatron_longpo.training.distributed import any_rank


@dataclass(frozen=True)
class Reason:
    """Why to leave.

    Args:
        text: To print.
        urgent: Somebody ends the run otherwise, and soon.
    """

    text: str
    urgent: bool


class Leaving:
    """Asks all ranks once per step whether it is time to leave, so that they leave together.

    Use as a context manager: the SIGTERM handler is there only inside, and stays once SIGTERM has come: torchrun passes
    it on to ranks that have it from the scheduler already, and the second must not end a run that is leaving.

    Args:
        settings: ``--exit-signal-handler``, ``--exit-duration-in-mins`` and ``--exit-interval``. Minutes count from the
            start of the process: what it loads before it trains takes a scheduler's time too.
    """

    def __init__(self, settings: TrainingConfig) -> None:
        self.settings = settings
        self.started_s = psutil.Process().create_time()
        self.signalled = False

    def __enter__(self) -> Leaving:
        if self.settings.exit_signal_handler:
            self.previous = signal.signal(signal.SIGTERM, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        if self.settings.exit_signal_handler and not self.signalled:
            signal.signal(signal.SIGTERM, self.previous)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signalled = True

    def reason(self, iteration: int) -> Reason | None:
        """Why to leave after this step, or None. Collectives: 1 all-reduce per condition that is switched on."""
        settings = self.settings
        if settings.exit_signal_handler and any_rank(self.signalled):
            return Reason("SIGTERM was received", urgent=True)
        if settings.exit_duration_in_mins is not None:
            minutes = (time.time() - self.started_s) / 60
            if any_rank(minutes >= settings.exit_duration_in_mins):
                return Reason(f"--exit-duration-in-mins {settings.exit_duration_in_mins} have passed", urgent=True)
        if settings.exit_interval is not None and iteration % settings.exit_interval == 0:
            return Reason(f"--exit-interval {settings.exit_interval} was reached", urgent=False)
        return None


def interrupted_text(settings: CheckpointConfig, iteration: int, total_steps: int) -> str:
    """How far a run came, and how it goes on from its last checkpoint."""
    newest = find_checkpoint(settings.save) if settings.save is not None else None
    if newest is None or newest.name == RELEASE:
        how = "it has saved no checkpoint, so the same command starts where it did"
    else:
        how = f"the last checkpoint is iteration {iteration_of(newest)}, where the same command "
        how += "goes on" if settings.load_equals_save else f"with --load {settings.save} goes on"
    return f"interrupted after iteration {iteration} of {total_steps}; {how}"
