"""A part of a layer in pieces of the row: the same numbers, sums in fp32, and nothing held that was not before."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from megatron_longpo.model.pieces import in_pieces
from megatron_longpo.model.remade import Remaking, remade


def normal(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """The same numbers in any dtype."""
    return torch.randn(shape, dtype=torch.float32).bfloat16().to(dtype)


def weights(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(normal(*shape, dtype=dtype)) for shape in ((6, 8), (8, 5))]


def gradients(dtype: torch.dtype, piece: int, tokens: int = 37) -> list[torch.Tensor]:
    """Of the row and of a weight; the result comes first. Two weights may get one tensor, and another one nothing."""
    used, unused = weights(dtype)
    added = torch.nn.Parameter(torch.zeros_like(used))
    torch.manual_seed(1)
    row = normal(tokens, 1, 6, dtype=dtype).requires_grad_()
    out = in_pieces(lambda x: torch.tanh(x @ (used + added)), row * 1, [used, added, unused], piece)
    out.backward(normal(tokens, 1, 8, dtype=dtype))
    assert unused.grad is None and torch.equal(added.grad, used.grad)  # type: ignore[arg-type]
    return [out.detach(), row.grad, used.grad]  # type: ignore[list-item]


@pytest.mark.parametrize("piece", [1, 5, 36, 37, 100])
def test_pieces_give_what_the_row_gives(piece: int) -> None:
    for ours, whole in zip(gradients(torch.float64, piece), gradients(torch.float64, 37), strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-12, atol=1e-12)


def test_weights_gradients_are_summed_in_fp32() -> None:
    exact = gradients(torch.float64, 4096, tokens=4096)[2]

    def error(piece: int) -> float:
        rounded = gradients(torch.bfloat16, piece, tokens=4096)[2].double()
        return float((rounded - exact).norm() / exact.norm())

    # Summed in bf16, 256 pieces would be off by 5 times as much as the whole row.
    assert error(16) < 1.5 * error(4096)


@pytest.mark.parametrize(("ranks_in", "ranks_out"), [(1, 2), (2, 1), (2, 2)])
def test_tokens_of_several_ranks(ranks_in: int, ranks_out: int) -> None:
    """A part that gathers returns every rank's tokens of the piece, one rank's behind the other's."""
    tokens = 7
    row = torch.randn(ranks_in * tokens, 3, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(ranks_out * tokens, 3, dtype=torch.float64)

    def part(piece: torch.Tensor) -> torch.Tensor:
        by_rank = piece.unflatten(0, (ranks_in, -1))
        if ranks_in == ranks_out:
            return (by_rank**2).flatten(0, 1)
        if ranks_in == 1:
            return torch.cat([by_rank[0] * (rank + 2) for rank in range(ranks_out)])
        return (by_rank * torch.arange(1.0, ranks_in + 1)[:, None, None]).sum(0)

    results = []
    for piece in (3, tokens):
        out = in_pieces(part, row, [], piece, ranks_in=ranks_in, ranks_out=ranks_out)
        results.append([out, *torch.autograd.grad(out, row, grad)])
    for ours, whole in zip(*results, strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-14, atol=1e-14)
    with torch.no_grad():
        evaluated = in_pieces(part, row, [], 3, ranks_in=ranks_in, ranks_out=ranks_out)
    assert torch.equal(evaluated, results[0][0])


@pytest.mark.parametrize("ranks", [1, 2])
def test_graphs_hold_neither_pieces_nor_what_is_made_of_them(ranks: int) -> None:
    used, _ = weights(torch.float64)
    source = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    made: list[weakref.ref[torch.UntypedStorage]] = []

    def part(piece: torch.Tensor) -> torch.Tensor:
        normed = remade(torch.sin, piece)
        out = normed @ used
        made.extend(weakref.ref(x.untyped_storage()) for x in (piece, normed, out))
        return out

    with Remaking().saving():
        row = source * 2
        out = in_pieces(part, row, [used], 2, ranks_in=ranks, ranks_out=ranks)
    gc.collect()
    alive = {ref() for ref in made} - {None}
    assert alive == ({row.untyped_storage()} if ranks == 1 else set())
    expected = torch.autograd.grad((torch.sin(source * 2) @ used).sum(), [source, used])
    torch.testing.assert_close(torch.autograd.grad(out.sum(), [source, used]), expected)
