"""``--attention-backend`` reaches the choice of the kernel, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_longpo.arguments import parse_arguments
from megatron_longpo.attention import function
from megatron_longpo.attention.context_parallel import context_parallel_attention
from megatron_longpo.attention.kernels import AttentionKernel
from megatron_longpo.data.layout import DocumentLayout, RowLayout
from megatron_longpo.model.specs import block_spec
from tests.tiny import MODEL_FLAGS


def test_the_chosen_kernel_computes_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    select = function.select_kernel

    def noted(device: torch.device, dtype: torch.dtype, backend: str) -> AttentionKernel:
        asked.append(backend)
        return select(device, dtype, backend)

    monkeypatch.setattr(function, "select_kernel", noted)
    layout = RowLayout((DocumentLayout(9, (2, 3)),))
    q, k, v = (torch.randn(layout.padded_tokens, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    context_parallel_attention(q, k, v, layout, None, "all_gather", 0.3, None, "fused").sum().backward()
    assert asked == ["fused", "fused"]


def test_the_layers_get_the_chosen_kernel() -> None:
    model: Any = parse_arguments(MODEL_FLAGS).model
    layer = block_spec(model, "local", 1, attention_backend="fused").layer_specs[0]
    assert layer.submodules.self_attention.submodules.core_attention.params == {"backend": "fused"}
