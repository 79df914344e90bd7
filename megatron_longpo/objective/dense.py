"""The plain twin of `megatron_longpo.objective.logprobs`: all logits at once, by autograd; for tests."""

# T=tokens of the row H=hidden_size V=vocabulary K=predictions

from __future__ import annotations

import torch


def linear_logprobs_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    source_index: torch.Tensor,
    targets: torch.Tensor,
    *,
    vocab_size: int,
) -> torch.Tensor:
    """``log softmax(hidden[source_index] @ weight.T)[targets]`` with the whole ``[K, V]`` in memory.

    Args:
        hidden: ``[T, H]``.
        weight: ``[V, H]``, the whole vocabulary.
        source_index: int64 ``[K]``, the row of ``hidden`` that makes each prediction.
        targets: int64 ``[K]``, token ids.
        vocab_size: Rows of the weight beyond it get no probability.

    Returns:
        ``[K]``, fp32 (fp64 for fp64).
    """
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logits = hidden[source_index].to(wide) @ weight[:vocab_size].to(wide).t()
    return logits.log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]
