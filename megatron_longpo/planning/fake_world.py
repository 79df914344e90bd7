"""One rank of a world of any size, alone in this process: PyTorch's fake process group, and fake tensors in it.

A fake tensor has shape, dtype and storage size, and no data. Collectives of the fake process group return at once. What
remains are the few places where a step wants a number or another rank's object; they are answered here and in
`fake_calls`.
"""

from __future__ import annotations

import dataclasses
import datetime
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_longpo.attention import row_order
from megatron_longpo.config import RunConfig
from megatron_longpo.data.layout import RowLayout
from megatron_longpo.planning.replaced import replaced
from megatron_longpo.training import loop
from megatron_longpo.training.distributed import initialize, shut_down

_NOISE = (
    "`torch.distributed.all_gather_into_tensor` is deprecated",
    "`torch.distributed.reduce_scatter_tensor` is deprecated",
    "When using sequence parallelism it is recommended to set the environment variable CUDA_DEVICE_MAX_CONNECTIONS",
)
"""Warnings of names that Megatron-Core calls and of streams, of which a fake world has none."""


@contextmanager
def fake_world(config: RunConfig, rank: int, world_size: int) -> Iterator[None]:
    """This process is one rank of a world: Megatron's parallel state is up, every collective does nothing.

    Args:
        config: A validated run; computes on the CPU.
        rank: Which rank.
        world_size: Of how many.
    """
    assert not dist.is_initialized(), "a dry run needs a process without a process group"
    make_group = dist.new_group

    def fake_group(
        ranks: Sequence[int] | None = None, timeout: datetime.timedelta | None = None, backend: Any = None, **rest: Any
    ) -> Any:
        return make_group(ranks, timeout=timeout, backend="fake", **rest)

    with warnings.catch_warnings():
        for message in _NOISE:
            warnings.filterwarnings("ignore", message=message)
        dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
        try:
            with replaced(dist, "new_group", fake_group):
                initialize(config)
            yield
        finally:
            shut_down()


@contextmanager
def fake_tensors(layout: RowLayout) -> Iterator[FakeTensorMode]:
    """Tensors made inside have no data.

    Args:
        layout: The layout of every row. Layers read it from a tensor, which here has none.
    """

    @lru_cache
    def windowed(window_tokens: int | None) -> RowLayout:
        return dataclasses.replace(layout, window_tokens=window_tokens)

    with ExitStack() as stack:
        for owner, name, value in (
            (RowLayout, "from_tensor", staticmethod(lambda encoded, window_tokens=None: windowed(window_tokens))),
            (dist, "all_gather_object", _gather_own_object),
            (torch.utils, "swap_tensors", _set_data),
            (loop, "any_rank", lambda flag: False),
        ):
            stack.enter_context(replaced(owner, name, value))
        _forget_index_tensors()
        try:
            yield stack.enter_context(FakeTensorMode())
        finally:
            _forget_index_tensors()


def _gather_own_object(objects: list[Any], own: Any, group: Any = None) -> None:
    """All ranks of a layout's stage say the same."""
    objects[:] = [own] * len(objects)


def _set_data(parameter: torch.Tensor, converted: torch.Tensor) -> None:
    """`torch.nn.Module.to` for fake parameters, whose weak references forbid the swap that torch would do."""
    parameter.data = converted.data
    # A fake tensor's device is Python's, and stays behind where the data go.
    parameter.fake_device = converted.device  # type: ignore[attr-defined]


def _forget_index_tensors() -> None:
    """Index tensors are kept per layout; real ones must not meet fake tensors, nor the reverse."""
    for order in (
        row_order.to_row_order,
        row_order.to_rank_order,
        row_order.to_group_order,
        row_order.from_group_order,
    ):
        order.cache_clear()
