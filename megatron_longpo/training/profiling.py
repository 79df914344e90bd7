"""``--profile``: a trace of some steps with a named range per stage, and a table of the stages' shares."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile

from megatron_longpo import platform, ranges
from megatron_longpo.config import RunConfig
from megatron_longpo.ranges import COMM, LM_HEAD, MLP, STAGES

_STEP = "step"
_OTHER = "other (projections, norms, element-wise)"


class StepProfiler:
    """Profiles the steps after ``--profile-step-start`` up to and including ``--profile-step-end`` on chosen ranks.

    Args:
        config: The run.
        chunks: This rank's model chunks, unwrapped.
        rank: This rank.
    """

    def __init__(self, config: RunConfig, chunks: Iterable[torch.nn.Module], rank: int) -> None:
        settings = config.logging
        self.first, self.last = settings.profile_step_start, settings.profile_step_end
        self.active = settings.profile and rank in settings.profile_ranks
        self.with_trace = settings.use_pytorch_profiler
        self.folder = Path(settings.profile_dir or (Path(config.checkpoint.save or ".") / "profile"))
        self.rank = rank
        self._open = contextlib.ExitStack()
        self._profile: profile | None = None
        self._done: list[int] = []
        if self.active:
            for chunk in chunks:
                _mark_stages(chunk)

    @property
    def running(self) -> bool:
        """Whether a step that runs now is profiled."""
        return bool(self._done)

    def synchronize(self) -> None:
        """Wait for the device, in profiled steps only: their parts are then timed exactly."""
        if self.running:
            platform.synchronize()

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Wrap step ``number``, counted from 1, in this."""
        if not (self.active and self.first < number <= self.last):
            yield
            return
        if not self._done:
            self._start()
        self._done.append(number)
        with ranges.named_range(_STEP):
            yield
            platform.synchronize()
        if number == self.last:
            self.close()

    def close(self) -> None:
        """Write the trace and print the table, if steps were profiled and are not written yet."""
        if not self._done:
            return
        self._open.close()
        if self._profile is not None:
            steps = f"{self._done[0]}-{self._done[-1]}"
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"rank-{self.rank}-steps-{steps}.pt.trace.json"
            self._profile.export_chrome_trace(str(path))
            shares = stage_shares(self._profile.events())
            print(f"{share_table(shares)}\nprofile of steps {steps} on rank {self.rank}: {path}", flush=True)
            self._profile = None
        self._done.clear()

    def _start(self) -> None:
        self._open.enter_context(ranges.switched_on())
        if self.with_trace:
            self._open.enter_context(platform.around_waits(lambda: ranges.named_range(COMM)))
            self._profile = self._open.enter_context(profile(activities=platform.profiler_activities()))
        else:
            self._open.enter_context(platform.nsight_range())


def _mark_stages(chunk: Any) -> None:
    for layer in chunk.decoder.layers:
        ranges.mark_module(layer.mlp, MLP)
    if chunk.post_process:
        ranges.mark_module(chunk.output_layer, LM_HEAD)


def stage_shares(events: Iterable[Any]) -> dict[str, float]:
    """Seconds of every stage in a profile, without those of stages inside it; ``other`` is what no stage covers.

    Device time on CUDA, where the host runs ahead; else the time of the thread that runs the step.

    Args:
        events: torch.profiler's events, linked into trees.
    """
    on_host = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    roots = [event for event in on_host if event.cpu_parent is None]
    use_device = platform.has_cuda()
    # On CUDA the backward pass runs in another thread, so its ranges are no part of the step's tree.
    trees = roots if use_device else [event for event in on_host if event.name == _STEP]

    def spent(event: Any) -> float:
        return (event.device_time_total if use_device else event.cpu_time_total) / 1e6

    seconds = dict.fromkeys([*STAGES, _OTHER], 0.0)
    pending = [(event, _OTHER) for event in trees]
    for event, stage in pending:
        seconds[stage] += spent(event)
    while pending:
        event, outer = pending.pop()
        for child in event.cpu_children:
            stage = _stage_of(child.name) or outer
            if stage != outer:
                seconds[stage] += spent(child)
                seconds[outer] -= spent(child)
            pending.append((child, stage))
    return seconds


def _stage_of(name: str) -> str | None:
    if name in STAGES:
        return name
    return COMM if name.startswith(("c10d::", "nccl:", "gloo:")) else None


def share_table(seconds: dict[str, float]) -> str:
    """The stages with seconds and per cent."""
    total = sum(seconds.values()) or 1.0
    lines = [f"{'stage':42}{'seconds':>10}{'share':>8}"]
    lines += [f"{stage:42}{s:10.3f}{s / total:8.1%}" for stage, s in seconds.items()]
    return "\n".join(lines)
