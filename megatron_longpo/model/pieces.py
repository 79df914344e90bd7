"""A part of a layer, one piece of the row after another, so that what it makes on the way exists for one piece only.

The norm in front of attention and the projections around it are such parts (``--projection-chunk-tokens``), and norm
and MLP (``--mlp-chunk-tokens``).
"""

# S=tokens of this rank as a module gets or returns them, all of its tensor-parallel ranks' or its own H=hidden_size

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megatron_longpo.model.remade import remade

Part = Callable[[torch.Tensor], torch.Tensor]


def in_pieces(
    part: Part,
    row: torch.Tensor,
    parameters: Sequence[torch.nn.Parameter],
    piece_tokens: int,
    *,
    ranks_in: int = 1,
    ranks_out: int = 1,
) -> torch.Tensor:
    """``part(row)``, of ``piece_tokens`` tokens of every rank at a time.

    Every piece has a graph of its own, and the weights' gradients are summed over the pieces in fp32: autograd would
    round the sum to the weights' dtype at every piece. A weight reports its gradient once, as it does without pieces.

    Collectives: those of ``part``, for every piece. All ranks that take part need rows of the same length.

    Args:
        part: Acts on every token by itself, apart from the ranks that it gathers from or scatters to.
        row: ``[S, …]``.
        parameters: The weights that ``part`` uses.
        piece_tokens: Tokens of a rank in a piece, at least 1; the last piece may be shorter.
        ranks_in: Ranks whose tokens ``row`` holds, one rank's behind the other's: the tensor-parallel size in front of
            a module that scatters the sequence.
        ranks_out: The same for the result, behind a module that gathers the sequence.

    Returns:
        ``[S · ranks_out / ranks_in, …]``.
    """
    if len(row) <= piece_tokens * ranks_in:
        return part(row)
    if torch.is_grad_enabled():
        return _InPieces.apply(part, row, piece_tokens, ranks_in, ranks_out, *parameters)
    whole = _Whole(ranks_out, len(row) // ranks_in)
    for tokens in _pieces(whole.tokens, piece_tokens):
        whole.put(tokens, part(_cut(row, ranks_in, tokens)))
    return whole.result()


class _InPieces(torch.autograd.Function):
    """The graphs of all pieces as one node. They hold what ``part`` saves, but neither its argument nor its result."""

    @staticmethod
    def forward(
        ctx: Any,
        part: Part,
        row: torch.Tensor,
        piece_tokens: int,
        ranks_in: int,
        ranks_out: int,
        *parameters: torch.nn.Parameter,
    ) -> torch.Tensor:
        """The whole result; see `in_pieces`."""
        anchor = row.new_empty(0, requires_grad=True)
        whole = _Whole(ranks_out, len(row) // ranks_in)
        graphs: list[tuple[slice, GradientEdge, GradientEdge]] = []
        for tokens in _pieces(whole.tokens, piece_tokens):
            # Where this copies, the copy is not kept but cut again from the row, which attention saves anyhow.
            piece = remade(partial(_cut, ranks=ranks_in, tokens=tokens), row)
            with torch.enable_grad():
                begin = _Beginning.apply(anchor, piece)
                end = part(begin)
            graphs.append((tokens, get_gradient_edge(begin), get_gradient_edge(end)))
            whole.put(tokens, end.detach())
        ctx.graphs, ctx.parameters = graphs, parameters
        ctx.row, ctx.ranks_in, ctx.ranks_out = row.shape, ranks_in, ranks_out
        return whole.result()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        """Gradients of the row and of the weights."""
        whole = _Whole(ctx.ranks_in, ctx.row[0] // ctx.ranks_in)
        sums: list[torch.Tensor | None] = [None] * len(ctx.parameters)
        # The order in which autograd would go: what was saved last is freed first.
        while ctx.graphs:
            tokens, begin, end = ctx.graphs.pop()
            grads = torch.autograd.grad(
                [end], [begin, *ctx.parameters], [_cut(grad, ctx.ranks_out, tokens)], allow_unused=True
            )
            whole.put(tokens, grads[0])
            for index, of_piece in enumerate(grads[1:]):
                total = sums[index]
                if total is not None:
                    total.add_(of_piece)
                elif of_piece is not None:
                    wide = torch.promote_types(of_piece.dtype, torch.float32)
                    sums[index] = of_piece.to(wide, copy=True)
        of_parameters = (
            None if total is None else total.to(parameter.dtype)
            for total, parameter in zip(sums, ctx.parameters, strict=True)
        )
        return None, whole.result(), None, None, None, *of_parameters


class _Beginning(torch.autograd.Function):
    """The piece, as the first tensor of a graph. A leaf would be held by its graph until the backward pass."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, piece: torch.Tensor) -> torch.Tensor:
        """``piece``; the empty ``anchor`` is what makes it need a gradient."""
        return piece.view_as(piece)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, None]:
        """Nothing: the gradient is taken in front of it."""
        return None, None


class _Whole:
    """What the pieces make, put together in its place.

    Args:
        ranks: Ranks whose tokens it holds, one rank's behind the other's.
        tokens: Tokens of each.
    """

    def __init__(self, ranks: int, tokens: int) -> None:
        self.tokens = tokens
        self._ranks = ranks
        self._whole: torch.Tensor | None = None

    def put(self, tokens: slice, piece: torch.Tensor) -> None:
        """The result for ``tokens`` of every rank."""
        by_rank = piece.unflatten(0, (self._ranks, -1))
        if self._whole is None:
            self._whole = piece.new_empty(self._ranks, self.tokens, *piece.shape[1:])
        self._whole[:, tokens] = by_rank

    def result(self) -> torch.Tensor:
        """``[ranks · tokens, …]``."""
        assert self._whole is not None
        return self._whole.flatten(0, 1)


def _pieces(total: int, piece_tokens: int) -> Iterator[slice]:
    return (slice(start, min(start + piece_tokens, total)) for start in range(0, total, piece_tokens))


def _cut(row: torch.Tensor, ranks: int, tokens: slice) -> torch.Tensor:
    """The ``tokens`` of every rank; a view if there is one rank."""
    return row.unflatten(0, (ranks, -1))[:, tokens].flatten(0, 1)
