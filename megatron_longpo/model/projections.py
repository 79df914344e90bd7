"""Attention's two projections, and the norm in front of them, in pieces of the row (``--projection-chunk-tokens``)."""

# S=tokens of this rank as a module gets or returns them, all of its tensor-parallel ranks' or its own H=hidden_size

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig

from megatron_longpo.model.norm import RMSNorm
from megatron_longpo.model.pieces import in_pieces


class PieceProjection:
    """Goes in front of a linear layer of Megatron's or Transformer Engine's among the bases of a class (`in_front_of`).

    With sequence parallel the layer's own collectives gather or scatter a piece at a time, so that the hidden states of
    all tensor-parallel ranks, ``[S, 1, H]``, never exist: not in the forward pass, and not in the backward pass, where
    the weight's gradient needs them once more.
    """

    _piece_tokens: int | None = None

    def take_pieces(self, config: TransformerConfig, tokens: int, gathers: bool, norm: RMSNorm | None = None) -> None:
        """From now on `forward` takes pieces.

        Args:
            config: Megatron's.
            tokens: In a piece; with sequence parallel of all tensor-parallel ranks together.
            gathers: The layer is the one that gathers the sequence under sequence parallel, not the one that
                scatters it.
            norm: Applied to every piece first.
        """
        ranks = config.tensor_model_parallel_size if config.sequence_parallel else 1
        self._piece_tokens = max(1, tokens // ranks)
        self._ranks = {"ranks_out" if gathers else "ranks_in": ranks}
        # In a tuple: as an attribute it would be a submodule, its weight one of this layer's.
        self._norm = () if norm is None else (norm,)
        for each in self._norm:
            each.left_to_consumer = True

    def forward(self, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``[S, 1, …]`` to ``[S, 1, …]`` and, where the caller is to add it, the bias; collectives of the layer."""
        if self._piece_tokens is None:
            return super().forward(row)  # type: ignore[misc,no-any-return]
        biases: list[torch.Tensor | None] = []
        project = super().forward  # type: ignore[misc]

        def part(piece: torch.Tensor) -> torch.Tensor:
            for norm in self._norm:
                piece = norm.normalise(piece)
            output, bias = project(piece)
            biases.append(bias)
            return output

        parameters = [p for module in (*self._norm, self) for p in module.parameters()]  # type: ignore[attr-defined]
        return in_pieces(part, row, parameters, self._piece_tokens, **self._ranks), biases[0]

    @classmethod
    def in_front_of(cls, linear: type[Any]) -> type[Any]:
        """A class of ``linear``'s layers that can take pieces."""
        return type(f"Piece{linear.__name__}", (cls, linear), {})
