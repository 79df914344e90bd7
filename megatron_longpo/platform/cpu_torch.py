"""A stand-in for the global name ``torch`` of Megatron-Core's modules that answers for the CPU."""

from __future__ import annotations

import contextlib
import importlib
import types
from collections.abc import Callable
from typing import Any

import torch

_MODULES_THAT_NAME_CUDA = (
    "utils",
    "models.common.embeddings.rotary_pos_embedding",
    "tensor_parallel.mappings",
    "tensor_parallel.layers",
    "tensor_parallel.utils",
    "tensor_parallel.random",
    "pipeline_parallel.schedules",
    "pipeline_parallel.p2p_communication",
    "distributed.param_and_grad_buffer",
    "distributed.distributed_data_parallel",
    "distributed.finalize_model_grads",
    "optimizer.optimizer",
    "optimizer.clip_grads",
    "optimizer.distrib_optimizer",
    "parallel_state",
    "dist_checkpointing.strategies.filesystem_async",
    "dist_checkpointing.strategies.state_dict_saver",
    "dist_checkpointing.strategies.async_utils",
    "dist_checkpointing.strategies.fully_parallel",
    "dist_checkpointing.exchange_utils",
)


def install_cpu_torch() -> None:
    """Give the stand-in to every module that names CUDA."""
    for name in _MODULES_THAT_NAME_CUDA:
        # A stand-in whose module moved in a later release has nothing to stand in for.
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(f"megatron.core.{name}").torch = CpuTorch()  # type: ignore[attr-defined]


class _CpuCuda:
    """Answers what Megatron asks of ``torch.cuda`` as a machine whose only device is the CPU would."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    @staticmethod
    def current_device() -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    @staticmethod
    def _nothing(*args: Any, **kwargs: Any) -> None:
        return None

    synchronize = empty_cache = set_device = _nothing
    current_stream = default_stream = _nothing

    get_rng_state = staticmethod(lambda device=None: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, device=None: torch.set_rng_state(state))
    manual_seed = staticmethod(torch.manual_seed)


class CpuTorch(types.ModuleType):
    """``torch``, with tensor factories that put ``device="cuda"`` on the CPU.

    Remove when Megatron-Core asks its configuration for the device instead of naming CUDA.
    """

    _FACTORIES = ("empty", "zeros", "ones", "full", "tensor", "arange", "rand", "randn", "empty_like", "zeros_like")

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = _CpuCuda()
        for name in self._FACTORIES:
            setattr(self, name, self._on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def create(*args: Any, **kwargs: Any) -> torch.Tensor:
            if str(kwargs.get("device", "")).startswith("cuda"):
                kwargs["device"] = "cpu"
            return factory(*args, **kwargs)

        return create
