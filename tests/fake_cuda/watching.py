"""What every operator of a step was given: the devices, where the host had to wait for the GPU, and on which stream."""

from __future__ import annotations

import sys
import weakref
from collections import Counter, defaultdict
from types import FrameType
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from megatron_longpo.planning.fake_calls import without_data
from tests.fake_cuda.device import STREAMS
from tests.fake_cuda.streams import HOST, Races

aten = torch.ops.aten

_SOURCES = ("/megatron_longpo/", "/megatron/core/", "/benchmarks/")
_SIZE_FROM_DATA = ("nonzero", "masked_select", "_unique2", "unique_dim", "repeat_interleave.Tensor")
"""Operators whose result's size only the GPU knows."""


class Watch(TorchDispatchMode):
    """Counts operators, and notes those that touch host memory or make the host wait.

    Attributes:
        calls: How often each operator ran, by its name without ``aten::``.
        on_host: Places in the code with a tensor in host memory among operands or results, and how often.
        waits: Places in the code at which the host waits for the GPU, and how often.
        dtypes: The dtypes of the results, by operator; several where its calls differ.
        races: What streams may do to each other's memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self._pinned: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self.races = Races(STREAMS)
        self.start_again()

    def start_again(self) -> None:
        """Forget what was seen; not which tensors are in pinned memory, nor who used them."""
        self.calls: Counter[str] = Counter()
        self.on_host: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.dtypes: defaultdict[str, set[tuple[str, ...]]] = defaultdict(set)
        self._read: torch.UntypedStorage | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = _tensors((args, kwargs))
        if given and func is not aten.lift_fresh.default and not any(isinstance(x, FakeTensor) for x in given):
            # Random states of the host have data.
            with _disable_current_modes():
                return func(*args, **kwargs)
        if func.namespace == "prim":
            return func(*args, **kwargs)
        name = func.__str__().removeprefix("aten.").removesuffix(".default")
        result = self._run(func, name, args, kwargs)
        made = _tensors(result)
        self.calls[name] += 1
        self.dtypes[name].add(tuple(str(tensor.dtype).removeprefix("torch.") for tensor in made))
        if any(tensor.device.type == "cpu" for tensor in (*given, *made)):
            self.on_host[_place()] += 1
        stream = STREAMS.current if any(tensor.is_cuda for tensor in (*given, *made)) else HOST
        self._use(func, name, args, kwargs, result, stream)
        if self._waits(name, args, kwargs, given, made):
            self.waits[f"{name} in {_place()}"] += 1
            STREAMS.wait(HOST, STREAMS.place(stream))
        return result

    def _use(self, func: Any, name: str, args: Any, kwargs: dict[str, Any], result: Any, stream: int) -> None:
        """Tell `races` what the operator reads and writes, by its schema."""
        schema = func._schema
        if name == "record_stream":
            self.races.record(args[0], args[1].number)
        if any(value.alias_info is not None and not value.alias_info.is_write for value in schema.returns):
            return  # a view
        reads: list[torch.Tensor] = []
        writes: list[torch.Tensor] = []
        given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
        for argument in schema.arguments:
            written = argument.alias_info is not None and argument.alias_info.is_write
            (writes if written else reads).extend(_tensors(given.get(argument.name)))
        if name.startswith(("empty", "new_empty")):
            self.races.begin(result, stream)
            return
        self.races.use(reads, [*writes, *_tensors(result)], stream, f"{name} in {_place()}")

    def _run(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        if name == "is_pinned":
            return args[0].untyped_storage() in self._pinned
        if name == "record_stream":
            return None
        if name == "_pin_memory":
            result = torch.empty_like(args[0])
        else:
            result = without_data(func, args)
            if result is NotImplemented:
                result = func(*args, **kwargs)
        if name == "_pin_memory" or kwargs.get("pin_memory"):
            self._pinned.add(result.untyped_storage())
        return result

    def _waits(self, name: str, args: Any, kwargs: dict[str, Any], given: Any, made: Any) -> bool:
        if name == "_local_scalar_dense":
            # `Tensor.tolist` asks a fake tensor for one element after another, and copies a real one as a whole.
            again, self._read = args[0].untyped_storage() is self._read, args[0].untyped_storage()
            return args[0].is_cuda and not again
        if name in _SIZE_FROM_DATA:
            return any(tensor.is_cuda for tensor in given)
        if name in ("index.Tensor", "index_put_", "index_put"):
            masks = any(index is not None and index.dtype == torch.bool for index in args[1])
            # Where one number is put, the mask stays one.
            filled = name != "index.Tensor" and args[2].numel() == 1 and not args[2].is_cuda
            return args[0].is_cuda and masks and not filled
        if name not in ("_to_copy", "copy_"):
            return False
        source, target = (args[1], args[0]) if name == "copy_" else (args[0], made[0])
        if source.device == target.device:
            return False
        on_host = source if source.device.type == "cpu" else target
        # A number goes to the GPU as an argument of a kernel.
        if source is on_host and source.dim() == 0 and name == "copy_":
            return False
        behind = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
        return not (behind and on_host.untyped_storage() in self._pinned)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _place() -> str:
    """The innermost function of the trainer or of Megatron-Core that runs: ``attention/ring.py: send``."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        for source in _SOURCES:
            if source in code.co_filename:
                return f"{source[1:]}{code.co_filename.split(source)[-1]}: {code.co_name}"
        frame = frame.f_back
    return "autograd"
