"""Inputs of the LM head's tests: a small head, and predictions whose sources and targets repeat."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class HeadInputs:
    """What `linear_logprobs` takes, with a weight of the whole vocabulary, and a gradient to send back."""

    hidden: torch.Tensor
    weight: torch.Tensor
    source_index: torch.Tensor
    targets: torch.Tensor
    grad_logps: torch.Tensor

    def leaves(self) -> HeadInputs:
        """The same values, with new leaves that require gradients."""
        return replace(
            self,
            hidden=self.hidden.detach().clone().requires_grad_(),
            weight=self.weight.detach().clone().requires_grad_(),
        )

    def to(self, device: str) -> HeadInputs:
        """The same values on another device."""
        return HeadInputs(*(value.to(device) for value in vars(self).values()))

    def arguments(self) -> tuple[torch.Tensor, ...]:
        """The positional arguments."""
        return self.hidden, self.weight, self.source_index, self.targets


def head_inputs(
    num_predictions: int = 53,
    *,
    row_tokens: int = 47,
    hidden_size: int = 16,
    vocab_rows: int = 40,
    vocab_size: int = 37,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> HeadInputs:
    """Random values; logits of a few units, some sources used often, some never."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return HeadInputs(
        hidden=normal(row_tokens, hidden_size),
        weight=normal(vocab_rows, hidden_size),
        source_index=torch.randint(row_tokens // 2 + 1, (num_predictions,), generator=generator).sort().values,
        targets=torch.randint(vocab_size, (num_predictions,), generator=generator),
        grad_logps=torch.randn(num_predictions, dtype=torch.float64, generator=generator).to(wide),
    )
