"""The parts of the GPU benchmark: which measurements each one asks for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.gpu.processes import Measurements, name_of
from benchmarks.gpu.settings import Settings
from benchmarks.step.case import StepCase
from benchmarks.step.run import available_variants
from benchmarks.suite import Matrix, variants_of
from megatron_longpo.config.training import FLASH, FUSED

BACKENDS = (FLASH, FUSED)
"""Attention kernels that need no further package."""


def rates(settings: Settings, measure: Measurements) -> None:
    """Exactness and rates of the attention kernels, and the rate of matrix products."""
    measure("errors", "float32", FLASH)
    measure("matmul")
    for backend in BACKENDS:
        measure("errors", "bfloat16", backend)
        measure("attention", backend)


def fastest_backend(measured: Mapping[str, Mapping[str, Any]]) -> str:
    """The attention kernel to train with: the fastest that was exact, or torch's own where none was measured."""
    exact = [name for name in BACKENDS if "relative_error" in measured.get(name_of("errors", "bfloat16", name), {})]
    speeds = {name: measured.get(name_of("attention", name), {}).get("both", 0.0) for name in exact}
    return max(speeds, key=lambda name: speeds[name], default=FLASH)


def timed_steps(settings: Settings) -> Iterator[tuple[str, str, str]]:
    """Shape, way to save memory and document tokens of the steps of `speed`, in its order."""
    for runs in settings.speed:
        for length in runs.lengths:
            yield runs.shape, runs.saving, str(length)


def speed(settings: Settings, measure: Measurements) -> None:
    """Steps of every shape, way to save memory and length."""
    backend = fastest_backend(measure.results.measured)
    for step in timed_steps(settings):
        measure("speed", *step, backend)


def lengths(settings: Settings, measure: Measurements) -> None:
    """Steps on documents of ever new lengths, and once more on the same ones."""
    backend = fastest_backend(measure.results.measured)
    for shape, saving, length in settings.new_lengths:
        measure("lengths", shape, saving, str(length), backend)


def memory(settings: Settings, measure: Measurements) -> None:
    """What a dry run says of the memory of those steps. It needs no GPU, but leaves it idle."""
    for step in timed_steps(settings):
        measure("memory", *step)


def longest(settings: Settings, measure: Measurements) -> None:
    """Longer and longer documents until one does not fit."""
    backend = fastest_backend(measure.results.measured)
    for shape, saving in settings.longest:
        for length in range(settings.first_length, settings.length_limit + 1, settings.first_length // 8):
            if "error" in measure("fits", shape, saving, str(length), backend):
                break


def rivals(settings: Settings, measure: Measurements) -> None:
    """The step suite's variants over length, each as far as it survives."""
    dead: set[str] = set()
    for case in rival_cases(settings):
        for variant in available_variants(case):
            if variant in variants_of(case) and variant not in dead:
                entry = measure(*rival_name(case, variant))
                if "error" in entry:
                    dead.add(variant)


def rival_cases(settings: Settings) -> Iterator[StepCase]:
    """The step suite's cases, shortest first."""
    return Matrix(settings.rivals, settings.rival_lengths, settings.more_rival_lengths).cases()


def rival_name(case: StepCase, variant: str) -> tuple[str, ...]:
    """The words of the measurement of a variant."""
    return "rival", variant, str(case.prefix_tokens), str(case.response_tokens), str(case.turns)


def num_threads() -> int:
    """Of each process."""
    return max((os.cpu_count() or 2) // 2, 1)
