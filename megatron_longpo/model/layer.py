"""Megatron's transformer layer with ways to keep less, and to work through the row in pieces."""

# T=tokens of this rank H=hidden_size F=ffn_hidden_size

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel.random import is_checkpointing
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch.utils.checkpoint import checkpoint

from megatron_longpo.model.offload import OffloadChain
from megatron_longpo.model.pieces import in_pieces
from megatron_longpo.model.remade import Remaking


class FrugalLayer(TransformerLayer):
    """A layer with ways to keep less between forward and backward pass. What is `remade` is never kept.

    The tokens of a piece are, with sequence parallel, those of all tensor-parallel ranks. None is the row as a whole.

    Args:
        mlp_chunk_tokens: Norm, MLP and residual of so many tokens at a time, recomputed in the backward pass: their
            inner activations, the widest of the layer, exist for one piece of the row instead of ``[T, 2F]``, and
            nothing but the half's input ``[T, H]`` is saved.
        projection_chunk_tokens: The norm in front of attention and the projections to queries, keys and values and
            from attention's output, of so many tokens at a time: with sequence parallel the hidden states of all ranks
            exist for one piece of the row. Nothing is recomputed for it.
        offload: Saved tensors go to the host; None keeps them.
    """

    def __init__(
        self,
        *args: Any,
        mlp_chunk_tokens: int | None = None,
        projection_chunk_tokens: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.offload: OffloadChain | None = None
        self._piece_tokens = mlp_chunk_tokens
        if mlp_chunk_tokens is not None and self.config.sequence_parallel:
            # The MLP gathers the tokens of all tensor-parallel ranks.
            self._piece_tokens = max(1, mlp_chunk_tokens // self.config.tensor_model_parallel_size)
        if projection_chunk_tokens is not None:
            attention, norm = self.self_attention, self.input_layernorm
            attention.linear_qkv.take_pieces(self.config, projection_chunk_tokens, gathers=True, norm=norm)
            attention.linear_proj.take_pieces(self.config, projection_chunk_tokens, gathers=False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer."""
        if not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)
        with self._remaking(kwargs.get("rotary_pos_emb")).saving():
            return super().forward(*args, **kwargs)

    def _remaking(self, rotary_angles: torch.Tensor | None) -> Remaking:
        """How this call saves. Under recomputation the group of layers is what waits on the host."""
        if self.offload is None or is_checkpointing():
            return Remaking()
        shared = [rotary_angles] if rotary_angles is not None else []
        offload = self.offload.next([*self.parameters(), *shared])
        return Remaking(offload.pack, offload.unpack)

    def _forward_mlp(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Norm, MLP and residual of ``[T, 1, H]``."""
        if self._piece_tokens is None or len(hidden_states) <= self._piece_tokens:
            return super()._forward_mlp(hidden_states, *args, **kwargs)
        whole = super()._forward_mlp

        def half(tokens: torch.Tensor) -> torch.Tensor:
            try:
                return whole(tokens, *args, **kwargs)
            finally:
                # Recomputation ends in the middle of it, where Megatron-Core 0.19 still holds the half's input here.
                self.mlp_norm_manager = None

        recomputed = partial(checkpoint, half, use_reentrant=False, preserve_rng_state=False)
        parameters = [*self.pre_mlp_layernorm.parameters(), *self.mlp.parameters()]
        return in_pieces(recomputed, hidden_states, parameters, self._piece_tokens)
