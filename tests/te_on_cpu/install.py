"""Lets a process without a GPU import Transformer Engine's own Python code, over formulas in place of its kernels.

Transformer Engine's wheel holds its Python modules; what they compute with is a compiled library that only a machine
with CUDA can load. `install` puts `extension` in that library's place. What is real then: Transformer Engine's layers,
their autograd functions, what they save, their collectives and their FusedAdam, and Megatron-Core's classes on top of
them. What is not: the kernels.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # before triton has a stand-in

CAPABILITY = (9, 0)
"""Of the GPU that Transformer Engine believes in: Hopper."""
_NOT_NEEDED = (
    "triton",
    "triton.language",
    "triton.language.standard",
    "einops",
    "transformer_engine.pytorch.onnx_extensions",
)
"""What it imports for kernels and an export that no test uses."""


def install(folder: str) -> None:
    """Make ``import transformer_engine`` work in this process. Call before Megatron-Core is imported.

    Args:
        folder: Where the wheel ``transformer_engine`` was unpacked.
    """
    assert "megatron.core" not in sys.modules, "Megatron-Core has looked for it already"
    from tests.te_on_cpu import extension

    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # its common part then loads no library
    os.environ["NVTE_UNFUSED_FP8_UPDATE"] = "1"  # its own formula for scaling factors
    sys.modules["transformer_engine_torch"] = extension
    # Its own __init__ would look for the compiled library.
    package = types.ModuleType("transformer_engine")
    package.__path__ = [str(Path(folder, "transformer_engine"))]
    package.__version__ = next(iter(importlib.metadata.distributions(name="transformer_engine", path=[folder]))).version
    sys.modules["transformer_engine"] = package
    absent = {
        name: mock.MagicMock(__spec__=None, __path__=[], __version__="3.5.0")
        for name in _NOT_NEEDED
        if name not in sys.modules
    }
    sys.modules.update(absent)
    with mock.patch("torch.compile", lambda model=None, **_: (lambda f: f) if model is None else model):
        package.common = importlib.import_module("transformer_engine.common")
        package.common.load_framework_extension = lambda framework: None
        package.pytorch = importlib.import_module("transformer_engine.pytorch")
    for name in absent:
        del sys.modules[name]
    _pretend()


def _pretend() -> None:
    """Transformer Engine finds a GPU, whose tensors lie in host memory. Nothing else does."""
    from megatron_longpo.platform.cpu_torch import CpuTorch

    seen = CpuTorch()
    seen.cuda = _Cuda()
    for name, module in list(sys.modules.items()):
        if name.startswith("transformer_engine.") and getattr(module, "torch", None) is torch:
            module.torch = seen  # type: ignore[attr-defined]
    distributed = importlib.import_module("transformer_engine.pytorch.distributed")
    distributed._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()  # type: ignore[attr-defined]
    distributed._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)  # type: ignore[attr-defined]
    is_cuda = torch.Tensor.is_cuda.__get__
    # Its layers refuse an input that is not.
    torch.Tensor.is_cuda = property(lambda self: _asked_by_te() or is_cuda(self))  # type: ignore[assignment]
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[assignment,method-assign]


def _asked_by_te() -> bool:
    return sys._getframe(2).f_globals.get("__name__", "").startswith("transformer_engine.")


class _Index(int):
    """A device's number that says what it is the number of."""

    def __str__(self) -> str:
        return f"cuda:{int(self)}"


class _Cuda:
    is_available = staticmethod(lambda: True)
    current_device = staticmethod(lambda: _Index(0))
    get_device_capability = staticmethod(lambda device=None: CAPABILITY)
    is_current_stream_capturing = staticmethod(lambda: False)
    synchronize = staticmethod(lambda device=None: None)

    @staticmethod
    def get_device_properties(device: Any = None) -> Any:
        return SimpleNamespace(major=CAPABILITY[0], minor=CAPABILITY[1], multi_processor_count=132)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)
