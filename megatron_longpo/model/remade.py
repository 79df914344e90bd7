"""Saved tensors that are cheaper to make again than to keep: the outputs of norms and of the MLP's gate.

A linear layer saves its input for its weight's gradient. Where that input is the output of an operator that saved all
it was made from, keeping both is keeping one of them for nothing: it is made again, bit by bit, when the backward pass
asks for it. In a layer with SwiGLU this drops ``2 [T, H] + [T, F]``, for two norms and a gate computed twice.
"""

# T=tokens of this rank H=hidden_size F=ffn_hidden_size

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from megatron_longpo.model.unchanged import Unchanged

Function = Callable[..., torch.Tensor]


def remade(function: Function, *inputs: torch.Tensor) -> torch.Tensor:
    """``function(*inputs)``; inside of `Remaking.saving`, no later operator keeps its storage for the backward pass.

    Args:
        function: Deterministic, and without state that changes before the backward pass.
        inputs: Should be saved anyhow, by ``function`` itself as a rule: they are what is kept, unless they are made
            again themselves.
    """
    made = function(*inputs)
    remaking = _active.get()
    if remaking is not None:
        remaking.note(made, function, inputs)
    return made


class Remaking:
    """What a layer's operators made with `remade`, while the layer computes.

    Args:
        pack: Applied to every other saved tensor, and to the inputs of those that are made again. By default they are
            kept, and a change in place is an error, as it is without hooks.
        unpack: Its inverse; may be called several times for one packed tensor.
    """

    def __init__(
        self,
        pack: Callable[[torch.Tensor], Any] = Unchanged,
        unpack: Callable[[Any], torch.Tensor] = Unchanged.tensor,
    ) -> None:
        self._pack_other, self._unpack_other = pack, unpack
        self._recipes: dict[int, _Recipe] = {}

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Autograd saves by this object's rules."""
        token = _active.set(self)
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
                yield
        finally:
            _active.reset(token)
            self._recipes.clear()

    def note(self, made: torch.Tensor, function: Function, inputs: tuple[torch.Tensor, ...]) -> None:
        """Remember how a tensor was made, for as long as it lives."""
        storage = made.untyped_storage()
        if any(x.untyped_storage() is storage for x in inputs):
            return  # a view: nothing was made
        key = id(storage)
        # Where nothing saves it, as inside of a checkpoint, its inputs must not live longer than it does.
        owner = weakref.ref(storage, lambda _: self._recipes.pop(key, None))
        self._recipes[key] = _Recipe(owner, made._version, function, tuple(Unchanged(x.detach()) for x in inputs))

    def _pack(self, tensor: torch.Tensor) -> Any:
        storage = tensor.untyped_storage()
        recipe = self._recipes.get(id(storage))
        if recipe is None or recipe.owner() is not storage or not recipe.makes(tensor):
            return self._pack_other(tensor)
        packed = tuple(self._pack(x.tensor()) for x in recipe.inputs)
        return _Again(recipe.function, packed, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def _unpack(self, packed: Any) -> torch.Tensor:
        if not isinstance(packed, _Again):
            return self._unpack_other(packed)
        with torch.no_grad():
            made = packed.function(*map(self._unpack, packed.inputs))
        return made.as_strided(packed.size, packed.stride, packed.offset)


@dataclass(frozen=True)
class _Recipe:
    """How a storage was filled, and at which version of its tensors."""

    owner: weakref.ref[torch.UntypedStorage]
    version: int
    function: Function
    inputs: tuple[Unchanged, ...]

    def makes(self, tensor: torch.Tensor) -> bool:
        """Whether it still makes this tensor of the storage, which may have been written to, as may the inputs."""
        return tensor._version == self.version and all(x.is_so for x in self.inputs)


@dataclass(frozen=True)
class _Again:
    """Stands for a saved tensor: how it is made from packed inputs, and where in the result it lies."""

    function: Function
    inputs: tuple[Any, ...]
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


_active: ContextVar[Remaking | None] = ContextVar("remaking", default=None)
