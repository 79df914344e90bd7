"""Megatron-Core's GPTModel on a shared-prefix row: rotary angles from position ids, token log-probs out."""

# T=tokens of this context-parallel rank H=hidden_size K=predictions

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_longpo.config import ModelConfig
from megatron_longpo.data.sending import sent
from megatron_longpo.model.rope import attention_factor, inverse_frequencies, rotary_angles
from megatron_longpo.objective.logprobs import linear_logprobs


class LogprobHead(ColumnParallelLinear):
    """Megatron's output layer with log-probs instead of logits.

    It is a module of its own because ``--overlap-param-gather`` waits for a weight when the module that owns it is
    called: used from outside, the weight could be the one before the last step.
    """

    def forward(
        self,
        hidden: torch.Tensor,
        source_index: torch.Tensor,
        targets: torch.Tensor,
        *,
        weight: torch.Tensor | None,
        vocab_size: int,
        chunk_tokens: int,
    ) -> torch.Tensor:
        """See `linear_logprobs`; ``weight`` replaces the layer's own where embeddings are tied."""
        if not self.sequence_parallel:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)
        return linear_logprobs(
            hidden.squeeze(1),
            self.weight if weight is None else weight,
            source_index,
            targets,
            vocab_size=vocab_size,
            chunk_tokens=chunk_tokens,
            tp_group=self.tp_group,
            sequence_parallel=self.sequence_parallel,
        )


class SharedPrefixGPT(GPTModel):
    """GPTModel whose forward takes one row and returns the log-probs of chosen predictions, never logits.

    Args:
        config: Megatron's transformer configuration.
        spec: Submodules of this stage's block, with `SharedPrefixAttention` inside.
        model: Shape of the model; gives vocabulary and rotary frequencies.
        padded_vocab_size: Rows of the embedding over all tensor-parallel ranks.
        logits_chunk_tokens: Predictions whose logits exist at one time.
        pre_process: This stage holds the embedding.
        post_process: This stage holds the final norm and the LM head.
        vp_stage: Virtual pipeline stage, with the interleaved schedule.
    """

    def __init__(
        self,
        config: TransformerConfig,
        spec: TransformerBlockSubmodules,
        model: ModelConfig,
        padded_vocab_size: int,
        logits_chunk_tokens: int,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(
            config,
            spec,
            vocab_size=padded_vocab_size,
            max_sequence_length=model.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            parallel_output=True,
            share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
            position_embedding_type="none",
            vp_stage=vp_stage,
        )
        if post_process:
            # GPTModel makes the layer itself; ours has the same parameters and another forward.
            self.output_layer.__class__ = LogprobHead
        self.model_shape = model
        self.logits_chunk_tokens = logits_chunk_tokens
        # A plain attribute: a buffer would be cast to bf16 with the weights, and angles need fp32.
        self.inverse_frequencies = inverse_frequencies(model)

    @contextlib.contextmanager
    def as_reference(self, rope: ModelConfig, window_tokens: int | None) -> Iterator[None]:
        """Evaluate as the reference model π_S, with the RoPE and the window that the model had before training.

        Args:
            rope: Its rotary base and scaling, YaRN's attention temperature among them.
            window_tokens: Tokens that a token sees, itself included; None is all.
        """
        attentions = [layer.self_attention.core_attention for layer in self.decoder.layers]
        trained = self.inverse_frequencies, [(a.window_tokens, a.softmax_scale) for a in attentions]
        self.inverse_frequencies = inverse_frequencies(rope)
        for attention in attentions:
            attention.window_tokens = window_tokens
            attention.softmax_scale = attention_factor(rope) ** 2 / rope.kv_channels**0.5
        try:
            yield
        finally:
            self.inverse_frequencies = trained[0]
            for attention, (tokens, scale) in zip(attentions, trained[1], strict=True):
                attention.window_tokens, attention.softmax_scale = tokens, scale

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        layout: torch.Tensor,
        source_index: torch.Tensor,
        targets: torch.Tensor,
    ) -> torch.Tensor:
        """Log-probs of the predictions of one row, or the hidden states that the next pipeline stage needs.

        Collectives: those of Megatron's layers; in the LM head those of `linear_logprobs`, and without sequence
        parallel a TP all-reduce of the hidden states' gradient.

        Args:
            input_ids: int64 ``[1, T]``.
            position_ids: int64 ``[1, T]``.
            layout: `RowLayout.to_tensor` of the whole row, int64, CPU.
            source_index: int64 ``[K]``; the row position whose hidden state makes each prediction.
            targets: int64 ``[K]``; the token predicted.

        Returns:
            fp32 ``[K]`` on the last pipeline stage, else hidden states ``[T, 1, H]`` (``[T / tp, 1, H]`` with
            sequence parallel).
        """
        embedded = self.embedding(input_ids=input_ids, position_ids=position_ids) if self.pre_process else None
        if self.inverse_frequencies.device != position_ids.device:
            self.inverse_frequencies = sent(self.inverse_frequencies, position_ids.device)
        with self._fp8_for_gradients_only():
            hidden = self.decoder(
                hidden_states=embedded,
                # Megatron passes this argument untouched to the core attention, also through recomputation.
                attention_mask=layout,
                rotary_pos_emb=rotary_angles(position_ids[0], self.inverse_frequencies),
            )
        if not self.post_process:
            return hidden
        tied = self.share_embeddings_and_output_weights
        return self.output_layer(
            hidden,
            source_index,
            targets,
            weight=self.shared_embedding_or_output_weight() if tied else None,
            vocab_size=self.model_shape.vocab_size,
            chunk_tokens=self.logits_chunk_tokens,
        )

    @contextlib.contextmanager
    def _fp8_for_gradients_only(self) -> Iterator[None]:
        """Evaluate in bf16, the reference above all.

        With delayed scaling the factors come from passes that were differentiated. Before the first of them they are 1,
        and most weights of a model would be 0 in fp8.
        """
        fp8 = self.config.fp8
        if not torch.is_grad_enabled():
            self.config.fp8 = None
        try:
            yield
        finally:
            self.config.fp8 = fp8
