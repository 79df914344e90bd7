"""Megatron-Core, imported without torch's compiler where there is no CUDA, and its checked releases."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from packaging.version import Version

from megatron_longpo.platform.devices import has_cuda
from megatron_longpo.platform.newer_megatron import do_without_triton


@contextlib.contextmanager
def _without_compiler() -> Iterator[None]:
    """Megatron-Core wraps a few fused functions in ``torch.compile`` when it is imported; without CUDA none is called.

    Loading the compiler takes as long as loading torch, in every process. Remove when upstream wraps them lazily.
    """
    compiler = torch.compile
    torch.compile = lambda model=None, **_: (lambda function: function) if model is None else model  # type: ignore
    try:
        yield
    finally:
        torch.compile = compiler


do_without_triton()
# Modules that import Megatron-Core import this package first.
with contextlib.nullcontext() if torch.cuda.is_available() else _without_compiler():
    import megatron.core

CHECKED_VERSIONS = ("0.16", "0.19")
"""Megatron-Core release series on which the adapters of this package were run."""


def require_checked_version() -> None:
    """Refuse a release that the adapters were not checked against, on a CPU.

    Raises:
        RuntimeError: With the releases that were.
    """
    version = Version(megatron.core.__version__)
    if f"{version.major}.{version.minor}" not in CHECKED_VERSIONS and not has_cuda():
        raise RuntimeError(
            f"megatron-core {version} was not checked on a CPU; checked: {', '.join(CHECKED_VERSIONS)}. Install one "
            "of these, or run the test suite and add the version to CHECKED_VERSIONS in megatron_longpo/platform."
        )
