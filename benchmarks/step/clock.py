"""Times of the steps of the process that asks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

from megatron_longpo import platform


@dataclass(frozen=True)
class StepTime:
    """One step. On an idle machine with one thread both are equal; beside other programs CPU time is the steadier."""

    wall_s: float
    cpu_s: float  # of all threads of the process


@dataclass
class StepClock:
    """Measures steps and tells of each as it ends.

    Args:
        tell: Gets ``{"wall_s": …, "cpu_s": …}`` of every step.
    """

    tell: Callable[[dict[str, float]], None]
    times: list[StepTime] = field(default_factory=list)
    _began: tuple[float, float] = (0.0, 0.0)

    def start(self) -> None:
        """A step begins."""
        platform.synchronize()
        self._began = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        """The step is done, on the device too."""
        platform.synchronize()
        wall, cpu = self._began
        self.times.append(StepTime(time.perf_counter() - wall, time.process_time() - cpu))
        self.tell(asdict(self.times[-1]))

    @contextmanager
    def step(self) -> Iterator[None]:
        """`start` and `stop`."""
        self.start()
        yield
        self.stop()
