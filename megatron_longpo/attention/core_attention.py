"""The core attention of Megatron's layers: same constructor and call, shared-prefix attention inside."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.enums import AttnMaskType

from megatron_longpo.attention.context_parallel import context_parallel_attention
from megatron_longpo.attention.function import follow
from megatron_longpo.attention.hierarchical import Hierarchy
from megatron_longpo.config.parallel import HIERARCHICAL
from megatron_longpo.config.training import FLASH
from megatron_longpo.data.layout import RowLayout


class SharedPrefixAttention(MegatronModule):
    """Takes the place of ``DotProductAttention`` and ``TEDotProductAttention`` in a layer spec; has no parameters.

    Megatron hands ``attention_mask`` through layers, pipeline stages' recomputation and checkpointing untouched, so it
    carries the row's layout (`RowLayout.to_tensor`) instead of a mask.

    Args:
        config: Megatron's configuration; ``window_size`` is read, and ``cp_comm_type`` where the argument is None.
        pg_collection: Gives the context-parallel group.
        attention_dropout: Must be 0, here and in ``config``.
        softmax_scale: Factor on the scores; ``1 / sqrt(kv_channels)`` if None.
        cp_comm_type: A value of ``--cp-comm-type``.
        backend: The kernel, a value of ``--attention-backend``.

    Whatever else Megatron passes is unused, kinds of masks above all: the layout says who sees whom.

    Raises:
        ValueError: The configuration asks for something that this attention does not do.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        pg_collection: ProcessGroupCollection,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        backend: str = FLASH,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        left, right = config.window_size or (-1, 0)
        unsupported = {
            f"--attention-dropout {dropout} (use 0)": dropout,
            f"--window-size {left},{right} (a causal window ends in 0)": right != 0,
            "windows of some layers only (leave out window_attn_skip_freq)": config.window_attn_skip_freq,
            "--apply-query-key-layer-scaling (leave it out)": config.apply_query_key_layer_scaling,
            f"--softmax-type {config.softmax_type} (use vanilla)": config.softmax_type != "vanilla",
        }
        for flag, is_set in unsupported.items():
            if is_set:
                raise ValueError(f"shared-prefix attention does not support {flag}")
        self.window_tokens = None if left < 0 else left + 1
        self.softmax_scale = 1.0 / math.sqrt(config.kv_channels) if softmax_scale is None else softmax_scale
        self.cp_comm_type = cp_comm_type or config.cp_comm_type or "all_gather"
        self.backend = backend
        self.cp_group = pg_collection.cp
        self.cp_hierarchy: Hierarchy | None = None
        if self.cp_comm_type == HIERARCHICAL and config.context_parallel_size > 1:
            # Megatron's layers hand on no group collection with these two in it.
            inner, ring = parallel_state.get_hierarchical_context_parallel_groups()
            self.cp_hierarchy = inner, ring

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Attention of one row.

        Collectives: those of `context_parallel_attention`.

        Args:
            query: ``[local_tokens, 1, heads, head_dim]``.
            key: ``[local_tokens, 1, kv_heads, head_dim]``.
            value: ``[local_tokens, 1, kv_heads, head_dim]``.
            attention_mask: `RowLayout.to_tensor` of the whole row, int64, CPU.
            attn_mask_type: Unused.
            attention_bias: Must be None.
            packed_seq_params: Must be None.

        Returns:
            ``[local_tokens, 1, heads * head_dim]``.

        Raises:
            ValueError: A batch of several rows, a bias or packed sequences; sizes that do not fit the layout.
        """
        if attention_bias is not None or packed_seq_params is not None:
            raise ValueError("shared-prefix attention takes no attention_bias and no packed_seq_params")
        if query.shape[1] != 1:
            raise ValueError(
                f"shared-prefix attention takes one row, got a batch of {query.shape[1]}: concatenate documents into "
                "one RowLayout"
            )
        out = context_parallel_attention(
            query.squeeze(1),
            key.squeeze(1),
            value.squeeze(1),
            RowLayout.from_tensor(attention_mask, self.window_tokens),
            self.cp_group,
            self.cp_comm_type,
            self.softmax_scale,
            self.cp_hierarchy,
            self.backend,
        )
        follow(attention_mask, out)
        return out.flatten(1).unsqueeze(1)
