"""Names for the stages of a step in a profile; without a profile they cost next to nothing.

A range around Python code covers what the code calls. A stage whose backward pass is left to autograd is entered and
left through its tensors (`Stage`), so that its backward pass gets a range too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.profiler import record_function

DATA = "data"
PREFIX_ATTENTION = "prefix attention"
BRANCH_ATTENTION = "branch attention"
MLP = "MLP"
LM_HEAD = "LM head"
LOSS = "loss"
OPTIMIZER = "optimizer"
COMM = "comm"
STAGES = (DATA, PREFIX_ATTENTION, BRANCH_ATTENTION, MLP, LM_HEAD, LOSS, OPTIMIZER, COMM)

_switched_on = False


@contextlib.contextmanager
def switched_on() -> Iterator[None]:
    """Ranges are recorded inside."""
    global _switched_on
    _switched_on = True
    try:
        yield
    finally:
        _switched_on = False


def named_range(name: str) -> contextlib.AbstractContextManager[Any]:
    """What runs inside has this name in a profile."""
    return record_function(name) if _switched_on else contextlib.nullcontext()


class Stage:
    """One passage through a stage: forward from `enter` to `leave`, backward the other way.

    Args:
        name: Of the stage.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._range: Any = None

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """The stage begins; use the returned tensor as its input."""
        if not _switched_on:
            return x
        x = _Boundary.apply(x, self, False)
        self._start()
        return x

    def leave(self, y: torch.Tensor) -> torch.Tensor:
        """The stage is done; use the returned tensor as its output."""
        if self._range is None:
            return y
        self._stop()
        return _Boundary.apply(y, self, True)

    def _start(self) -> None:
        self._range = record_function(self._name)
        self._range.__enter__()

    def _stop(self) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None


class _Boundary(torch.autograd.Function):
    """The identity; its backward begins or ends the stage's backward range."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, stage: Stage, begins: bool) -> torch.Tensor:
        """A view of ``x``, of any shape."""
        ctx.stage, ctx.begins = stage, begins
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """The gradient as it is; opens the range behind the stage's output, closes it at its input."""
        if ctx.begins:
            ctx.stage._start()
        else:
            ctx.stage._stop()
        return grad, None, None


def mark_module(module: torch.nn.Module, name: str) -> None:
    """Make every call of a module, whose first input and first output are tensors, a passage through a stage."""
    passages: list[Stage] = []

    def enter(_: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not _switched_on:
            return None
        passages.append(Stage(name))
        return (passages[-1].enter(inputs[0]), *inputs[1:])

    def leave(_: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        if not passages:
            return None
        stage = passages.pop()
        if output is None:  # it raised, as a checkpoint does once it has recomputed what it needs
            stage._stop()
            return None
        return (stage.leave(output[0]), *output[1:]) if isinstance(output, tuple) else stage.leave(output)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave, always_call=True)
