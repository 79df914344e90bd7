"""The device of this process: which one it is, its backend, its queue and its memory."""

from __future__ import annotations

import importlib.util
import os
import re
import resource
import sys
from pathlib import Path

import torch


def has_cuda() -> bool:
    """Whether this process computes on CUDA. ``LONGPO_USE_CPU=1`` hides the GPU, as ``--use-cpu`` does."""
    return torch.cuda.is_available() and os.environ.get("LONGPO_USE_CPU") != "1"


def device() -> torch.device:
    """This rank's device: ``cuda:LOCAL_RANK``, or the CPU."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if has_cuda() else torch.device("cpu")


def device_name() -> str:
    """What the device calls itself."""
    return torch.cuda.get_device_name(device()) if has_cuda() else "CPU"


def default_backend() -> str:
    """The collective backend of `device`."""
    return "nccl" if has_cuda() else "gloo"


def default_transformer_impl() -> str:
    """``transformer_engine`` where it can run, else ``local``."""
    if has_cuda() and importlib.util.find_spec("transformer_engine") is not None:
        return "transformer_engine"
    return "local"


def synchronize() -> None:
    """Wait for the device's queued work; nothing to wait for on a CPU."""
    if has_cuda():
        torch.cuda.synchronize()


def peak_memory_gib() -> float:
    """Peak memory of this process: allocated CUDA memory, or the resident set on a CPU. GiB."""
    if has_cuda():
        return torch.cuda.max_memory_allocated() / 2**30
    # Better than getrusage, which counts the program too that started this process and was replaced by it.
    status = Path("/proc/self/status")
    if status.exists() and (kib := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(kib[1]) / 2**20
    kib_per_unit = 1 / 1024 if sys.platform == "darwin" else 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kib_per_unit / 2**20


def peak_pinned_memory_gib() -> float:
    """Peak of the host memory that torch pinned for this process, as the blocks it took; 0 on a CPU. GiB."""
    return torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0) / 2**30 if has_cuda() else 0.0
