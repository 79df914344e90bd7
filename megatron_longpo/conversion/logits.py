"""Logits of a split model, to compare it with another implementation. Training never makes them."""

# T=tokens V=vocab H=hidden_size

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from megatron_longpo import platform
from megatron_longpo.config import RunConfig
from megatron_longpo.data.layout import DocumentLayout, RowLayout
from megatron_longpo.model.build import unwrap


@torch.no_grad()
def model_logits(config: RunConfig, chunks: list[Any], tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Logits of one plain causal sequence; every rank calls it.

    Collectives: those of Megatron's layers and schedule, and 1 TP all-gather of the logits.

    Args:
        config: The run, with context-parallel size 1.
        chunks: This rank's model chunks.
        tokens: int64 ``[T]``; T is a multiple of TP with sequence parallel.
        positions: int64 ``[T]``, the tokens' position ids. Rotary scaling shows where they lie far apart.

    Returns:
        fp32 ``[T, V]`` on the last pipeline stage, CPU; ``[0, V]`` elsewhere.
    """
    vocab_size = config.model.vocab_size
    layout = RowLayout((DocumentLayout(len(tokens), ()),), row_multiple=config.parallel.row_multiple).to_tensor()
    device = platform.device()
    nothing = torch.zeros(0, dtype=torch.int64, device=device)
    # The interleaved schedule needs as many micro-batches as stages: the same one again and again.
    repeats = parallel_state.get_pipeline_model_parallel_world_size() if len(chunks) > 1 else 1
    hidden: list[torch.Tensor] = []
    logits = [torch.zeros(0, vocab_size)]

    def forward_step(iterator: Iterator[torch.Tensor], model: torch.nn.Module) -> Any:
        output = model(next(iterator)[None], positions[None].to(device), layout, nothing, nothing)

        def loss(_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
            logits.append(_logits(unwrap(model), hidden[-1])[:, :vocab_size])
            return torch.zeros((), device=device), torch.ones((), dtype=torch.int, device=device), {}

        return output, loss

    def keep(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        hidden[:] = [output]

    # The model itself gives log-probs of single targets; the final hidden states are all that is missing.
    hooks = [unwrap(chunk).decoder.register_forward_hook(keep) for chunk in chunks]
    try:
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter([tokens.to(device)] * repeats) for _ in chunks],
            model=chunks,
            num_microbatches=repeats,
            seq_length=len(tokens),
            micro_batch_size=1,
            forward_only=True,
        )
    finally:
        for hook in hooks:
            hook.remove()
    return logits[-1].float().cpu()


def _logits(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Logits of all tensor-parallel ranks' vocabulary, ``[T, padded V]``, from hidden states ``[T, 1, H]``."""
    group = parallel_state.get_tensor_model_parallel_group()
    if model.config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, group=group)
    tied = model.share_embeddings_and_output_weights
    weight = model.shared_embedding_or_output_weight() if tied else model.output_layer.weight
    own = hidden.squeeze(1) @ weight.T
    parts = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(parts, own.contiguous(), group=group)
    return torch.cat(parts, dim=-1)
