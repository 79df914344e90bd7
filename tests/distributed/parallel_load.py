"""Loading checkpoints as several GPUs do, on CPU ranks: each reads a part and broadcasts it to the others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_longpo import platform
from megatron_longpo.training import checkpoint


@contextlib.contextmanager
def parallel_load() -> Iterator[None]:
    """Let `Checkpointer.load` share the reading, with host memory where Megatron names CUDA."""
    make_data = ShardedTensor.init_data

    def on_host(tensor: ShardedTensor, device: Any, *args: Any) -> None:
        make_data(tensor, "cpu" if device == "cuda" else device, *args)

    class WithCuda(ModuleType):
        """The package `platform` as one of its users sees it."""

        has_cuda = staticmethod(lambda: True)

        def __getattr__(self, name: str) -> Any:
            return getattr(platform, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "platform", WithCuda("platform"))
        patch.setattr(ShardedTensor, "init_data", on_host)
        patch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
        yield
