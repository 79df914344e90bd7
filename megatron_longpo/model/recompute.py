"""Full recomputation of layers that computes their attention once (``--recompute-keep-attention``)."""

# T=tokens of this rank H=hidden_size D=head_dim

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_block import TransformerBlock

from megatron_longpo.attention.kept import KeptResults


class KeepingBlock(TransformerBlock):
    """Megatron's transformer block with another loop of recomputed layers.

    Megatron makes the block itself, so this class is given to an instance (`keep_attention`). What it keeps between
    forward and backward pass is, per layer, attention's output ``[T, H]`` and log-sum-exps, and, per group of
    ``--recompute-num-layers``, the group's input ``[T, H]``.
    """

    def _checkpointed_forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor, rotary_pos_emb: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        """Takes the arguments of Megatron's method; those that a decoder-only model leaves out are unused."""
        for start, stop, recomputed in self._groups():
            group = _LayerGroup(self, start, stop)
            if recomputed:
                hidden_states = tensor_parallel.checkpoint(group, False, hidden_states, attention_mask, rotary_pos_emb)
            else:
                hidden_states = group.layers(hidden_states, attention_mask, rotary_pos_emb)
        return hidden_states

    def _groups(self) -> Iterator[tuple[int, int, bool]]:
        """First layer, one past the last, and whether they are recomputed: the groups of ``--recompute-method``."""
        num_layers, chosen = self.num_layers_per_pipeline_rank, self.config.recompute_num_layers
        if self.config.recompute_method == "uniform":
            yield from ((start, min(start + chosen, num_layers), True) for start in range(0, num_layers, chosen))
        else:
            yield from ((layer, layer + 1, layer < chosen) for layer in range(num_layers))


class _LayerGroup:
    """A run of layers as the checkpoint calls it, twice; owns the attention results of one micro-batch."""

    def __init__(self, block: KeepingBlock, start: int, stop: int) -> None:
        self._layers = [block._get_layer(index) for index in range(start, stop)]
        self._kept = KeptResults()

    def __call__(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor, rotary_pos_emb: torch.Tensor
    ) -> torch.Tensor:
        with self._kept.in_use():
            return self.layers(hidden_states, attention_mask, rotary_pos_emb)

    def layers(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor, rotary_pos_emb: torch.Tensor
    ) -> torch.Tensor:
        """The layers without recomputation."""
        for layer in self._layers:
            hidden_states, _ = layer(
                hidden_states=hidden_states, attention_mask=attention_mask, rotary_pos_emb=rotary_pos_emb
            )
        return hidden_states


def keep_attention(block: TransformerBlock) -> None:
    """Make a block's full recomputation keep what attention computes."""
    block.__class__ = KeepingBlock
