"""Full recomputation of layers that keeps attention's results, and what it keeps on the host if asked to."""

# T=tokens of this rank H=hidden_size

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_block import TransformerBlock

from megatron_longpo.attention.kept import KeptResults
from megatron_longpo.model.offload import LayerOffload, OffloadChain


class FrugalBlock(TransformerBlock):
    """Megatron's transformer block with another loop of recomputed layers.

    Megatron's own knows fp8, which this one does not, and fails where groups of layers do not divide a stage. Megatron
    makes the block itself, so this class is given to an instance (`make_frugal`). Between forward and backward pass it
    keeps, per group of ``--recompute-num-layers``, the group's input ``[T, H]`` and, per layer, attention's output
    ``[T, H]`` and log-sum-exps (``--recompute-keep-attention``).
    """

    keeps_attention: bool
    offload: OffloadChain
    num_offloaded_layers: int

    def _checkpointed_forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor, rotary_pos_emb: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        """Takes the arguments of Megatron's method; those that a decoder-only model leaves out are unused."""
        for start, stop, recomputed in self._groups():
            layers = [self._get_layer(index) for index in range(start, stop)]
            if not recomputed:
                hidden_states = _through(layers, hidden_states, attention_mask, rotary_pos_emb)
            elif start < self.num_offloaded_layers and torch.is_grad_enabled():
                offload = self.offload.next([rotary_pos_emb])
                with offload.saving():
                    group = _RecomputedLayers(layers, self.keeps_attention, offload)
                    hidden_states = group.checkpointed(hidden_states, attention_mask, rotary_pos_emb)
            else:
                group = _RecomputedLayers(layers, self.keeps_attention, None)
                hidden_states = group.checkpointed(hidden_states, attention_mask, rotary_pos_emb)
        return hidden_states

    def _groups(self) -> Iterator[tuple[int, int, bool]]:
        """First layer, one past the last, and whether they are recomputed: the groups of ``--recompute-method``."""
        num_layers, chosen = self.num_layers_per_pipeline_rank, self.config.recompute_num_layers
        if self.config.recompute_method == "uniform":
            yield from ((start, min(start + chosen, num_layers), True) for start in range(0, num_layers, chosen))
        else:
            yield from ((layer, layer + 1, layer < chosen) for layer in range(num_layers))


class _RecomputedLayers:
    """Layers as the checkpoint calls them, twice; owns the attention results of one micro-batch."""

    def __init__(self, layers: list[torch.nn.Module], keeps_attention: bool, offload: LayerOffload | None) -> None:
        self._layers = layers
        self._kept: KeptResults | None = None
        if keeps_attention:
            self._kept = KeptResults(offload.pack, offload.unpack) if offload is not None else KeptResults()

    def checkpointed(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The layers, to be recomputed in the backward pass."""
        return tensor_parallel.checkpoint(self, False, *inputs)

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        if self._kept is None:
            return _through(self._layers, *inputs)
        with self._kept.in_use():
            return _through(self._layers, *inputs)


def _through(
    layers: list[torch.nn.Module],
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor,
    rotary_pos_emb: torch.Tensor,
) -> torch.Tensor:
    for layer in layers:
        hidden_states, _ = layer(
            hidden_states=hidden_states, attention_mask=attention_mask, rotary_pos_emb=rotary_pos_emb
        )
    return hidden_states


def make_frugal(block: TransformerBlock, keeps_attention: bool, num_offloaded_layers: int) -> None:
    """Give a block's recomputation what Megatron's has not.

    Args:
        block: Its layers are `FrugalLayer`s if some are offloaded.
        keeps_attention: Full recomputation keeps what attention computes.
        num_offloaded_layers: What these first layers save, recomputed or not, waits on the host.
    """
    chain = OffloadChain()
    for layer in block.layers[:num_offloaded_layers]:
        layer.offload = chain
    block.__class__ = FrugalBlock
    block.keeps_attention, block.offload, block.num_offloaded_layers = keeps_attention, chain, num_offloaded_layers
