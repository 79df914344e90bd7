"""What one process of the GPU benchmark measures, by the words of its name."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.settings import Settings
from megatron_longpo import platform


def measure(settings: Settings, words: Sequence[str]) -> dict[str, Any]:
    """The measurement that the words name.

    Args:
        settings: Sizes.
        words: ``device``; ``errors DTYPE BACKEND``; ``matmul``; ``attention BACKEND``; ``speed MODEL TOKENS STEPS
            BACKEND``; ``memory MODEL TOKENS``. A backend is a value of ``--attention-backend``.
    """
    kind, *rest = words
    if kind == "device":
        return _device()
    if kind == "errors":
        from benchmarks.gpu.rates import kernel_error

        return {"relative_error": kernel_error(getattr(torch, rest[0]), rest[1])}
    if kind in ("matmul", "attention"):
        from benchmarks.gpu import rates

        return (
            {"tflops": rates.matmul_tflops(settings)} if kind == "matmul" else rates.attention_tflops(settings, *rest)
        )
    from benchmarks.gpu import training

    with tempfile.TemporaryDirectory(prefix="benchmark-gpu-") as folder:
        if kind == "memory":
            return training.predicted_memory(settings.models[rest[0]], int(rest[1]), Path(folder))
        return training.speed(settings.models[rest[0]], int(rest[1]), int(rest[2]), Path(folder), rest[3])


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
