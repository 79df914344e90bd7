"""Device and host as two memories where the dry run has one: on a CPU everything is on the same device.

What waits on the host is copied there and back by two pieces of code, which run here as they are with the transfers
between: `platform.HostCopy`, which has the saved activations of ``--cpu-offloading-num-layers``, and Megatron's
`HybridDeviceOptimizer`, which has the optimizer state of ``--optimizer-cpu-offload``.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from megatron_longpo import platform
from megatron_longpo.planning.ledger import MemoryLedger
from megatron_longpo.planning.replaced import replaced
from megatron_longpo.training import optimizer


@contextmanager
def two_memories(ledger: MemoryLedger) -> Iterator[None]:
    """Inside, what is sent to the host is on the ledger as host memory, and what comes back as a new device tensor."""
    with ExitStack() as stack:
        stack.enter_context(replaced(platform, "HostCopy", partial(_HostCopy, ledger)))
        stack.enter_context(replaced(optimizer, "refuse_offload_without_gpu", lambda: None))
        for name in ("__init__", "step"):
            method = _with_host(vars(HybridDeviceOptimizer)[name], ledger)
            stack.enter_context(replaced(HybridDeviceOptimizer, name, method))
        yield


class _HostCopy(platform.HostCopy):
    """The allocations of `platform.HostCopy` on CUDA."""

    def __init__(self, ledger: MemoryLedger, tensor: torch.Tensor) -> None:
        self._ledger = ledger
        super().__init__(tensor)

    def _send(self, tensor: torch.Tensor) -> None:
        with self._ledger.on_host():
            self._host = tensor.detach().clone()

    def _bring_back(self) -> torch.Tensor:
        return self._host.clone()


def _with_host(method: Callable[..., Any], ledger: MemoryLedger) -> Callable[..., Any]:
    """A method that takes a CPU's tensors for CUDA tensors unless they were sent to the host."""

    def called(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            # Copies are in order where nothing runs beside anything else.
            for name in ("current_stream", "Stream"):
                stack.enter_context(replaced(torch.cuda, name, _Stream))
            stack.enter_context(replaced(torch.cuda, "stream", nullcontext))
            stack.enter_context(_Transfers(ledger))
            return method(*args, **kwargs)

    return called


class _Stream:
    def wait_stream(self, stream: Any) -> None:
        """Nothing: everything runs in order."""

    def record_event(self) -> Any:
        """An event that has happened."""
        return types.SimpleNamespace(synchronize=lambda: None, wait=lambda stream: None)


class _Transfers(TorchFunctionMode):
    """``Tensor.cpu`` copies, pinned memory is the host's, and what is made from tensors on the host is on the host."""

    def __init__(self, ledger: MemoryLedger) -> None:
        super().__init__()
        self._ledger = ledger

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return not self._ledger.is_on_host(args[0])
        if func in (torch.Tensor.cpu, torch.Tensor.pin_memory):
            with self._ledger.on_host():
                return args[0].clone()
        pinned = kwargs.pop("pin_memory", False)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if pinned or any(map(self._ledger.is_on_host, tensors)):
            with self._ledger.on_host():
                return func(*args, **kwargs)
        return func(*args, **kwargs)
