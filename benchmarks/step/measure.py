"""One variant in this process: python -m benchmarks.step.measure VARIANT FOLDER STEPS CASE_AS_JSON

Tells on stdout, as JSON lines, the time of every step, and at the end `Measurement` as a dictionary. Peak memory is
counted from what the interpreter takes with everything imported and nothing built.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.step.case import StepCase

VARIANTS = {
    "shared_prefix": "benchmarks.step.trainer:run_shared_prefix",
    "two_sequences": "benchmarks.step.trainer:run_two_sequences",
    "two_sequences_full_logits": "benchmarks.step.trainer:run_two_sequences_full_logits",
    "shared_prefix_dpo": "benchmarks.step.trainer:run_shared_prefix_dpo",
    "trl": "benchmarks.step.trl_dpo:run_trl",
    "lm_head": "benchmarks.step.lm_head:run_lm_head",
}


@dataclass(frozen=True)
class Measurement:
    """What one process found: the loss and time of every step, and its peak memory above the idle interpreter."""

    losses: list[float]
    wall_s: list[float]
    cpu_s: list[float]
    idle_gib: float
    peak_gib: float


def measure(variant: str, folder: Path, num_steps: int, case: StepCase, tell: Callable[[Any], None]) -> Measurement:
    """Run a variant's steps in this process, which must not have done anything else."""
    from benchmarks.step.clock import StepClock
    from megatron_longpo.platform import peak_memory_gib

    module, function = VARIANTS[variant].split(":")
    run = getattr(importlib.import_module(module), function)
    idle = peak_memory_gib()
    clock = StepClock(tell)
    losses = run(case, folder, num_steps, clock)
    wall, cpu = [time.wall_s for time in clock.times], [time.cpu_s for time in clock.times]
    return Measurement(losses, wall, cpu, idle, peak_memory_gib() - idle)


def main(arguments: list[str]) -> None:
    """Measure, and keep stdout for our own lines: trainers print there too."""
    variant, folder, num_steps, case = arguments
    warnings.filterwarnings("ignore")

    def tell(line: Any) -> None:
        print(json.dumps(line), file=protocol, flush=True)

    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as protocol, contextlib.redirect_stdout(sys.stderr):
        result = measure(variant, Path(folder), int(num_steps), StepCase(**json.loads(case)), tell)
        tell(asdict(result))


if __name__ == "__main__":
    main(sys.argv[1:])
