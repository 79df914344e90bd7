"""The parts of the GPU benchmark: which measurements each one asks for."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu.processes import Measurements, OutOfTime, failure
from benchmarks.gpu.settings import Settings
from benchmarks.step.case import WEIGHTS, StepCase, write_document, write_weights
from benchmarks.step.run import VariantFailed, available_variants, run_variant
from benchmarks.suite import Matrix, variants_of
from megatron_longpo.config.training import FLASH, FUSED

BACKENDS = (FLASH, FUSED)
"""Attention kernels that need no further package."""
NUM_STEPS = 3
"""Of a speed measurement; the first is a warm-up."""


def rates(settings: Settings, measure: Measurements) -> None:
    """Exactness and rates of the attention kernels, and the rate of matrix products."""
    measure("errors", "float32", FLASH)
    measure("matmul")
    for backend in BACKENDS:
        measure("errors", "bfloat16", backend)
        measure("attention", backend)


def fastest_backend(measured: Mapping[str, Mapping[str, Any]]) -> str:
    """The attention kernel to train with: the fastest that was exact, or torch's own where none was measured."""
    exact = [name for name in BACKENDS if "relative_error" in measured.get(f"errors bfloat16 {name}", {})]
    speeds = {name: measured.get(f"attention {name}", {}).get("both", 0.0) for name in exact}
    return max(speeds, key=lambda name: speeds[name], default=FLASH)


def speed(settings: Settings, measure: Measurements) -> None:
    """Steps of every model at every length, and what a dry run says of their memory; ends at what does not fit."""
    backend = fastest_backend(measure.results.measured)
    for name, lengths in settings.speed.items():
        for length in lengths:
            entry = measure("speed", name, str(length), str(NUM_STEPS), backend)
            measure("memory", name, str(length))
            if "error" in entry:
                break


def longest(settings: Settings, measure: Measurements) -> None:
    """Doubles the document until it does not fit, then halves the interval twice."""
    backend = fastest_backend(measure.results.measured)
    for name in settings.longest:
        fits, fails = 0, 0
        length = settings.first_length
        halvings = 0
        while halvings < 3 and length <= settings.length_limit:
            entry = measure("speed", name, str(length), "1", backend)
            if entry.get("out_of_memory"):
                fails = length
            elif "error" in entry:
                break
            else:
                fits = length
            halvings += fails > 0
            length = (fits + fails) // 2 if fails else 2 * length


def rivals(settings: Settings, measure: Measurements) -> None:
    """The step suite's variants over length, each as far as it survives."""
    matrix = Matrix(settings.rivals, settings.rival_lengths, settings.more_rival_lengths)
    cases = list(matrix.cases())
    longest_case = max(cases, key=lambda case: case.prefix_tokens + case.branch_tokens)
    dead: set[str] = set()
    with tempfile.TemporaryDirectory(prefix="benchmark-gpu-") as folder:
        for case in cases:
            wanted = [name for name in available_variants(case) if name in variants_of(case)]
            for variant in wanted:
                name = rival_name(case, variant)
                entry = measure.results.get(name)
                if entry is None and variant not in dead:
                    measure.seconds_left()
                    if not (Path(folder) / WEIGHTS).exists():
                        write_weights(longest_case, Path(folder))
                    write_document(case, Path(folder))
                    entry = _rival(case, variant, Path(folder), measure)
                    measure.results.put(name, entry)
                    print(f"{name}: {json.dumps(entry)}", flush=True)
                if entry is not None and "error" in entry:
                    dead.add(variant)


def _rival(case: StepCase, variant: str, folder: Path, measure: Measurements) -> dict[str, Any]:
    left_s = measure.seconds_left()
    try:
        return dataclasses.asdict(run_variant(case, variant, folder, 2, num_threads(), timeout_s=left_s))
    except TimeoutError as error:
        raise OutOfTime from error
    except VariantFailed as error:
        return failure(error.text, error.exit_code)


def num_threads() -> int:
    """Of each rival's process."""
    return max((os.cpu_count() or 2) // 2, 1)


def rival_name(case: StepCase, variant: str) -> str:
    """What the measurement of a variant is called."""
    return f"rival {variant} {case.prefix_tokens} {case.response_tokens} {case.turns}"
