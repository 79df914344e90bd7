"""What one process of the GPU benchmark measures, by the words of its name."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import rates, training
from benchmarks.gpu.settings import Settings
from benchmarks.step.case import WEIGHTS, write_document, write_weights
from benchmarks.step.measure import measure as measure_step
from megatron_longpo import platform

_RIVAL_STEPS = 4
"""Of a process; the fastest counts."""


def measure(settings: Settings, words: Sequence[str], folder: Path) -> dict[str, Any]:
    """The measurement that the words name.

    Args:
        settings: Sizes.
        words: ``device``; ``errors DTYPE BACKEND``; ``matmul``; ``attention BACKEND``; ``speed SHAPE SAVING TOKENS
            BACKEND``; ``lengths``, ``fits`` and the same; ``memory SHAPE SAVING TOKENS``; ``rival VARIANT TOKENS
            RESPONSE_TOKENS TURNS``. A backend is a value of ``--attention-backend``.
        folder: For datasets, and for the weights that all rivals share.
    """
    kind, *rest = words
    if kind == "device":
        return _device()
    if kind == "errors":
        return {"relative_error": rates.kernel_error(getattr(torch, rest[0]), rest[1])}
    if kind == "matmul":
        return {"tflops": rates.matmul_tflops(settings)}
    if kind == "attention":
        return rates.attention_tflops(settings, *rest)
    if kind == "rival":
        return _rival(settings, rest[0], [int(word) for word in rest[1:]], folder)
    shape, saving, tokens, *backend = rest
    case = dataclasses.replace(settings.shapes[shape], prefix_tokens=int(tokens))
    flags = settings.savings[saving]
    if kind == "memory":
        return training.predicted_memory(case, flags, folder)
    if kind == "fits":
        return training.longest_step(case, flags, folder, backend[0], settings.window_tokens)
    if kind == "lengths":
        return training.new_lengths(case, flags, folder, backend[0])
    return training.speed(case, flags, folder, backend[0])


def _rival(settings: Settings, variant: str, sizes: Sequence[int], folder: Path) -> dict[str, Any]:
    prefix_tokens, response_tokens, turns = sizes
    case = dataclasses.replace(
        settings.rivals, prefix_tokens=prefix_tokens, response_tokens=response_tokens, turns=turns
    )
    if not (folder / WEIGHTS).exists():
        write_weights(dataclasses.replace(case, prefix_tokens=max(settings.rival_lengths)), folder)
    write_document(case, folder)
    return dataclasses.asdict(measure_step(variant, folder, _RIVAL_STEPS, case, lambda step: None))


def _device() -> dict[str, Any]:
    """The device's name, memory and driver; asked in a process of its own, which holds no memory afterwards."""
    properties = torch.cuda.get_device_properties(platform.device())
    asked = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "driver": (asked.stdout.split() or ["unknown"])[0],
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
    }
