"""Operators on fake tensors, fast: what an operator returned once it returns again for arguments of the same shapes.

A step runs the same few hundred operators on the same shapes in every layer and micro-batch, and `FakeTensorMode` takes
100 µs for each, most of it to look its own cache up for cases that a step does not have (symbolic shapes, tracing,
sparse and quantized tensors). Here a key is shapes, strides and dtypes. The first call of every key goes through
`FakeTensorMode`, with all its checks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

aten = torch.ops.aten

_VIEWS = {
    aten.alias.default,
    aten.detach.default,
    aten.expand.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.squeeze.dim,
    aten.t.default,
    aten.transpose.int,
    aten.unbind.int,
    aten.unsqueeze.default,
    aten.view.default,
    aten._unsafe_view.default,
}
"""Operators that return views of their first argument; their kernels need nothing but its shape."""

_IN_PLACE_COLLECTIVES = {torch.ops.c10d._allgather_base_.default, torch.ops.c10d._reduce_scatter_base_.default}
"""Collectives that return their first argument, which they have filled."""

_UNFIT = {
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.inplace_view,
}
"""Marks of operators whose results shapes do not determine, or which change an argument's shape."""

Maker = Callable[[tuple[Any, ...]], Any]
"""Makes the result of a repeated call from its arguments."""


class FakeCalls:
    """Results of operators on the fake tensors of a mode: the same tensors and the same storages as the mode's own.

    Args:
        mode: Of all fake tensors; entered by the caller.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._makers: dict[tuple[Any, ...], Maker | None] = {}

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the operator returns; ``NotImplemented`` leaves it to the mode."""
        if func is torch.ops.prim.device.default and not self._mode.in_kernel_invocation:
            return args[0].fake_device
        if (result := without_data(func, args)) is not NotImplemented:
            return result
        if func in _IN_PLACE_COLLECTIVES:
            return args[0], FakeWork().boxed()
        if func.namespace != "aten":
            return NotImplemented
        if func in _VIEWS and type(args[0]) is FakeTensor and args[0].constant is None:
            with in_kernel_invocation_manager(self._mode):
                views = func(*args, **kwargs)
            device = args[0].fake_device
            if isinstance(views, torch.Tensor):
                return FakeTensor(self._mode, views, device)
            return [FakeTensor(self._mode, view, device) for view in views]
        return self._repeated(func, args, kwargs)

    def _repeated(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            key = (func, torch.get_default_dtype(), _key(args), _key(tuple(kwargs.items())))
            maker = self._makers.get(key, NotImplemented)
        except _NoKeyError:
            return NotImplemented
        if maker is None:
            return NotImplemented
        if maker is NotImplemented:
            result = func(*args, **kwargs)
            self._makers[key] = None if _UNFIT & set(func.tags) else self._maker(result, args, kwargs)
            return result
        return maker(args)

    def _maker(self, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Maker | None:
        """How to make such a result again; None where it is more than new tensors or an argument."""
        if result is None:
            return lambda args: None
        for position, argument in enumerate(args):
            if result is argument:
                return lambda args: args[position]
        if isinstance(result, tuple | list):
            makers = [self._maker(each, args, kwargs) for each in result]
            kind = type(result)
            return None if None in makers else lambda args: kind(maker(args) for maker in makers)  # type: ignore[misc]
        if type(result) is not FakeTensor or result.constant is not None or result.storage_offset():
            return None
        storage = result.untyped_storage()
        given = _fake_tensors((args, tuple(kwargs.values())))
        if any(tensor.untyped_storage()._cdata == storage._cdata for tensor in given):
            return None
        shape, stride, dtype, device = result.shape, result.stride(), result.dtype, result.fake_device
        mode, num_bytes = self._mode, storage.nbytes()

        def make(args: tuple[Any, ...]) -> FakeTensor:
            with in_kernel_invocation_manager(mode):
                empty = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
            return FakeTensor(mode, empty, device)

        return make if make(args).untyped_storage().nbytes() == num_bytes else None


def without_data(func: Any, args: tuple[Any, ...]) -> Any:
    """Results of operators that fake tensors do not have: numbers are 1 and true, grouped collectives are done."""
    if func is aten._local_scalar_dense.default:
        dtype = args[0].dtype
        return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
    if func.namespace == "c10d" and "coalesced" in func.__name__:
        return FakeWork().boxed()
    return NotImplemented


class _NoKeyError(Exception):
    """An argument that a key cannot be made of."""


def _key(value: Any) -> Any:
    """Tensors by what results depend on; numbers with their types, since 1, 1.0 and true are equal."""
    kind = type(value)
    if kind is FakeTensor:
        if value.constant is not None:
            raise _NoKeyError
        return value.shape, value.stride(), value.dtype, value.fake_device
    if kind in (tuple, list) or kind.__name__ == "immutable_list":
        return tuple(_key(each) for each in value)
    if kind in (int, float, bool, str) or value is None:
        return kind, value
    if kind in (torch.dtype, torch.device, torch.layout, torch.memory_format):
        return value
    raise _NoKeyError


def _fake_tensors(tree: Any) -> list[FakeTensor]:
    if isinstance(tree, FakeTensor):
        return [tree]
    if isinstance(tree, tuple | list):
        return [tensor for each in tree for tensor in _fake_tensors(each)]
    return []
