"""What memory is spent on, and how much of each at most."""

from __future__ import annotations

from enum import StrEnum


class Part(StrEnum):
    """What memory is spent on, in the order of the reports."""

    WEIGHTS = "weights"
    GRADIENTS = "gradients"
    OPTIMIZER = "optimizer"
    ACTIVATIONS = "activations"
    ATTENTION = "attention workspace"
    LM_HEAD = "LM head"
    COMMUNICATION = "communication buffers"


class PartCounter:
    """Bytes that are alive in one memory by part, and their peaks.

    Attributes:
        live: Bytes alive now.
        peak: Bytes at the moment of the highest total.
        own_peaks: The highest bytes of each part, at whatever moment; together they can be more than ever was alive.
    """

    def __init__(self) -> None:
        self.live = dict.fromkeys(Part, 0)
        self._grown = False
        self.restart_peaks()

    @property
    def total(self) -> int:
        """Bytes alive now, all parts."""
        return sum(self.live.values())

    @property
    def peak_total(self) -> int:
        """The highest total."""
        return sum(self.peak.values())

    def restart_peaks(self) -> None:
        """Forget the peaks so far."""
        self.peak, self.own_peaks = dict(self.live), dict(self.live)

    def add(self, part: Part, num_bytes: int) -> None:
        """Allocate, or free with a negative number; peaks are as of the last `settle`."""
        self.live[part] += num_bytes
        self._grown |= num_bytes > 0

    def settle(self, workspace: dict[Part, int] | None = None) -> None:
        """Raise the peaks to what is alive, once an operation is over.

        Args:
            workspace: What the operation had beside it and has freed again.
        """
        if not self._grown and not workspace:
            return
        self._grown = False
        held = self.live
        if workspace:
            held = {part: num_bytes + workspace.get(part, 0) for part, num_bytes in held.items()}
        for part, num_bytes in held.items():
            if num_bytes > self.own_peaks[part]:
                self.own_peaks[part] = num_bytes
        if sum(held.values()) > self.peak_total:
            self.peak = dict(held)
