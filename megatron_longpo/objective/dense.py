"""The plain twin of `logprobs.linear_logprobs`: all logits at once, autograd does the rest. For tests."""

# T=tokens K=predictions H=hidden_size V=vocabulary

from __future__ import annotations

import torch


def linear_logprobs_reference(
    hidden: torch.Tensor, weight: torch.Tensor, source_index: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """log softmax(hidden[source] · weightᵀ)[target]: ``[T, H]``, ``[V, H]``, int64 ``[K]`` twice → ``[K]``."""
    logits = hidden[source_index] @ weight.T
    return logits.log_softmax(dim=-1).gather(1, targets[:, None]).squeeze(1)
