"""RMSNorm as the layers have it."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig

from megatron_longpo.model.remade import remade


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with Megatron's constructor, and with sequence parallel, which Megatron's own wrapper refuses.

    Under sequence parallel every rank normalises other tokens, so the gradient of the weight is a sum over ranks:
    Megatron all-reduces the gradients of parameters that carry ``sequence_parallel``.
    """

    left_to_consumer = False
    """`forward` hands its input on as it is: the consumer calls `normalise`, on a piece of the row at a time."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`normalise`, unless that is left to the consumer."""
        return hidden if self.left_to_consumer else self.normalise(hidden)

    def normalise(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension; the result is not kept for the backward pass of what it goes into."""
        return remade(super().forward, hidden)
