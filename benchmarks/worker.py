"""One variant of the step benchmark, measured in a process of its own:

    python -m benchmarks.worker VARIANT PROBLEM_JSON MODEL_FOLDER NUM_STEPS NUM_THREADS

Prints one JSON object: seconds of every step, loss of the first one, resident memory when idle (everything imported)
and its peak from there on.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.problem import Problem


def _shared_prefix() -> Callable[..., Callable[[], float]]:
    from benchmarks.ours import shared_prefix

    return shared_prefix


def _two_sequences() -> Callable[..., Callable[[], float]]:
    from benchmarks.ours import two_sequences

    return two_sequences


def _two_sequences_full_logits() -> Callable[..., Callable[[], float]]:
    from benchmarks.ours import two_sequences_full_logits

    return two_sequences_full_logits


OURS = {
    "shared-prefix": _shared_prefix,
    "two-sequences": _two_sequences,
    "two-sequences-full-logits": _two_sequences_full_logits,
}


def main() -> None:
    """Run the variant that the command line names and print what was measured."""
    variant, problem_json, folder, num_steps, num_threads = sys.argv[1:]
    problem = Problem(**json.loads(problem_json))
    torch.set_num_threads(int(num_threads))
    loss = None
    if variant == "trl":
        from benchmarks.trl_dpo import run_trl

        idle = _resident_mib("VmRSS", reset_peak=True)
        seconds = run_trl(problem, Path(folder), int(num_steps))
    else:
        build = OURS[variant]()
        idle = _resident_mib("VmRSS", reset_peak=True)
        step = build(problem, Path(folder))
        seconds = []
        for number in range(int(num_steps)):
            began = time.perf_counter()
            value = step()
            seconds.append(time.perf_counter() - began)
            loss = value if number == 0 else loss
    peak = _resident_mib("VmHWM")
    print(json.dumps({"seconds": seconds, "loss": loss, "idle_mib": idle, "peak_mib": peak}))


def _resident_mib(field: str, reset_peak: bool = False) -> float:
    """A line of Linux's /proc/self/status in MiB; importing must not count as a peak, so it can be forgotten first."""
    if reset_peak:
        Path("/proc/self/clear_refs").write_text("5")
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {field}; this benchmark measures memory on Linux only")
    return int(found.group(1)) / 1024


if __name__ == "__main__":
    main()
