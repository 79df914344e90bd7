"""Checkpoints of the distributed optimizer in which every rank writes and reads its own shard, and nothing else.

Megatron's ``fully_reshardable`` format stores the state of a parameter in the parameter's own shape, so that it loads
at any parallel sizes. To write it, upstream gathers the state on the first rank of every data-parallel group and copies
it once more for the writer; to read it, every rank loads the state of all parameters of its stage. It lies in host
memory, 12 bytes per weight: 70B at TP 8 and PP 1 are 840 GB a node, and twice that on the node of all first ranks.

But a shard is a range of the flattened parameters, a range is a few blocks, and torch's format stores blocks of any
size. The files say the same to every reader: upstream's checkpoints can be read here, and these ones there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

Block = tuple[tuple[int, ...], tuple[int, ...]]
"""Where a block begins in each dimension, and its size in each."""


def blocks(start: int, stop: int, shape: Sequence[int]) -> Iterator[Block]:
    """A range of a flattened tensor as blocks of the tensor, in the order of their elements.

    Args:
        start, stop: Which elements.
        shape: Of the whole tensor.
    """
    if start >= stop:
        return
    if len(shape) < 2:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    row_elements = math.prod(shape[1:])
    row, skipped = divmod(start, row_elements)
    if skipped or stop < start + row_elements:
        end = min(stop, (row + 1) * row_elements)
        for offset, size in blocks(skipped, end - row * row_elements, shape[1:]):
            yield (row, *offset), (1, *size)
    else:
        rows = (stop - start) // row_elements
        end = start + rows * row_elements
        yield (row, *(0 for _ in shape[1:])), (rows, *shape[1:])
    yield from blocks(end, stop, shape)


def let_ranks_write_their_own_shards() -> None:
    """Save and load the distributed optimizer's state without gathering it.

    Remove when ``sharded_param_state_fully_reshardable`` needs host memory for a rank's own shard only.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer as Upstream

    ours: dict[str, Callable[..., Any]] = {
        "sharded_param_state_fully_reshardable": _sharded_state,
        "load_parameter_state_from_fully_reshardable": _load_state,
    }
    for name, method in ours.items():
        setattr(Upstream, name, functools.wraps(getattr(Upstream, name))(method))


def _sharded_state(self: Any, model_sharded_state_dict: Any, is_loading: bool = False, metadata: Any = None) -> Any:
    """This rank's state: by number of the parameter and name, blocks in order. To load, they lie in host memory."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

    tensors, _ = extract_sharded_tensors_and_factories(model_sharded_state_dict)
    sharded = {tensor.data: tensor for tensor in nested_values(tensors)}
    parts: dict[int, dict[str, dict[int, Any]]] = {}
    for number, parameter, start, end in _own_ranges(self):
        parts[number] = {}
        for name, state in self._get_main_param_and_optimizer_states(parameter).items():
            if name == "step" or not isinstance(state, torch.Tensor):
                continue  # in the parameter groups
            flat = state.detach().view(-1)
            assert len(flat) == end - start
            if is_loading:
                flat = torch.empty_like(flat, device="cpu")
            elif flat.device.type == "cpu":
                # The next step may change it while a background save writes it.
                flat = flat.clone()
            parts[number][name] = dict(enumerate(_own_blocks(sharded[parameter], name, flat, start)))
    return parts


@torch.no_grad()
def _load_state(self: Any, state_dict: Any) -> None:
    """Put what was loaded into the blocks of `_sharded_state` into the optimizer."""
    from megatron.core.optimizer import HybridDeviceOptimizer

    for number, parameter, _, _ in _own_ranges(self):
        state = {
            name: torch.cat([part[i].view(-1) for i in range(len(part))]) for name, part in state_dict[number].items()
        }
        self._set_main_param_and_optimizer_states(parameter, state)
    if isinstance(self.optimizer, HybridDeviceOptimizer):
        self.optimizer._sync_hdo_state_to_sub_optimizers()


def _own_ranges(optimizer: Any) -> Iterator[tuple[int, torch.nn.Parameter, int, int]]:
    """The parameters that this rank updates: number, parameter, and which of its elements."""
    maps = (m for buffers in optimizer.gbuf_ranges for buckets in buffers.values() for m in buckets)
    ranges = ((parameter, found["param"]) for m in maps for parameter, found in m["param_map"].items())
    for number, (parameter, own) in enumerate(ranges):
        yield number, parameter, own.start, own.end


def _own_blocks(sharded: Any, name: str, state: torch.Tensor, start: int) -> Iterator[Any]:
    """Some state of a parameter's elements from ``start`` on, as tensors of a checkpoint."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    for origin, tensor in _stored_tensors(sharded):
        first, last = max(start, origin), min(start + len(state), origin + math.prod(tensor.local_shape))
        # The format has no blocks with prepended axes: the number of the layer is an axis like the others.
        ones = (1,) * tensor.prepend_axis_num
        for offset, size in blocks(first - origin, last - origin, tensor.local_shape):
            place = zip(tensor.global_offset, (*(0 for _ in ones), *offset), strict=True)
            data = state[first - start : first - start + math.prod(size)].view(*ones, *size)
            yield ShardedTensor(
                key=f"optimizer.state.{name}.{tensor.key}",
                data=data,
                dtype=data.dtype,
                local_shape=(*ones, *size),
                global_shape=tensor.global_shape,
                global_offset=tuple(theirs + ours for theirs, ours in place),
                axis_fragmentations=None,
                # The parameter is on all data-parallel ranks, this part of its state on one.
                replica_id=(*tensor.replica_id[:-1], 0),
                allow_shape_mismatch=tensor.allow_shape_mismatch,
            )
            first += math.prod(size)


def _stored_tensors(sharded: Any) -> Iterator[tuple[int, Any]]:
    """The tensors of a checkpoint that hold a parameter: which element of it each begins with, and the tensor."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    if not isinstance(sharded, ShardedTensorFactory):
        yield 0, sharded
        return
    # As the gate and up projections that one weight holds: two tensors. Views of nothing say where they begin.
    nothing = torch.empty(sharded.data.shape, device="meta")
    for tensor in nested_values(replace(sharded, data=nothing).build()):
        assert tensor.data.is_contiguous(), f"{tensor.key} is no range of its parameter"
        yield tensor.data.storage_offset(), tensor
