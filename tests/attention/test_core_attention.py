"""The module that Megatron builds: its call, what it refuses, and activation recomputation around it."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch.utils.checkpoint import checkpoint

from megatron_longpo.attention.core_attention import SharedPrefixAttention
from megatron_longpo.attention.dense import dense_attention
from megatron_longpo.data.layout import DocumentLayout, RowLayout

LAYOUT = RowLayout((DocumentLayout(30, (5, 6)),), row_multiple=8)
HEADS, GROUPS, HEAD_DIM = 4, 2, 8


def build(softmax_scale: float | None = None, **overrides: object) -> SharedPrefixAttention:
    settings: dict[str, object] = {
        "num_layers": 1,
        "hidden_size": HEADS * HEAD_DIM,
        "num_attention_heads": HEADS,
        "num_query_groups": GROUPS,
        "attention_dropout": 0.0,
        **overrides,
    }
    return SharedPrefixAttention(
        config=TransformerConfig(**settings),
        layer_number=1,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
        cp_comm_type=None,
        softmax_scale=softmax_scale,
        pg_collection=SimpleNamespace(cp=None),
    )


def fused_projection() -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """A leaf laid out as Megatron's fused projection, and query, key and value cut from it."""
    generator = torch.Generator().manual_seed(0)
    shape = (LAYOUT.padded_tokens, 1, GROUPS, HEADS // GROUPS + 2, HEAD_DIM)
    fused = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    return fused, (fused[:, :, :, :-2].flatten(2, 3), fused[:, :, :, -2], fused[:, :, :, -1])


@pytest.mark.parametrize(
    ("softmax_scale", "window_size"), [(None, None), (0.7, None), (None, (6, 0)), (None, (-1, 0)), (None, (0, 0))]
)
def test_equals_dense_twin(softmax_scale: float | None, window_size: tuple[int, int] | None) -> None:
    fused, (query, key, value) = fused_projection()
    out = build(softmax_scale, window_size=window_size)(
        query,
        key,
        value,
        LAYOUT.to_tensor(),
        attn_mask_type=AttnMaskType.causal,
        attention_bias=None,
        packed_seq_params=None,
    )
    assert out.shape == (LAYOUT.padded_tokens, 1, HEADS * HEAD_DIM)
    scale = softmax_scale or 1 / math.sqrt(HEAD_DIM)
    # Megatron counts the tokens before a query, the layout those that it sees.
    window_tokens = window_size[0] + 1 if window_size and window_size[0] >= 0 else None
    layout = replace(LAYOUT, window_tokens=window_tokens)
    expected = dense_attention(query[:, 0], key[:, 0], value[:, 0], layout, scale).flatten(1).unsqueeze(1)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    grad_out = torch.randn_like(out)
    (actual_grad,) = torch.autograd.grad(out, fused, grad_out)
    (expected_grad,) = torch.autograd.grad(expected, fused, grad_out)
    torch.testing.assert_close(actual_grad, expected_grad, rtol=0, atol=1e-12)


def test_recomputed_is_bit_equal() -> None:
    """Reentrant checkpointing, like Megatron's, hands tensors on and nothing else: the layout must be one."""
    module = build()
    results = []
    for recompute in (False, True):
        fused, arguments = fused_projection()
        arguments = (*arguments, LAYOUT.to_tensor())
        out = checkpoint(module, *arguments, use_reentrant=True) if recompute else module(*arguments)
        out.square().sum().backward()
        results.append((out.detach(), fused.grad))
    for direct, recomputed in zip(*results, strict=True):
        assert torch.equal(direct, recomputed)


def test_a_row_that_passes_twice() -> None:
    """Layers of one pass know each other by the row; that of a pass which is over must not be started again."""
    module, row = build(), LAYOUT.to_tensor()
    gradients, outputs = [], []
    for _ in range(2):
        fused, projected = fused_projection()
        outputs.append(module(*projected, row))  # kept, and with it the first pass's graph
        gradients.append(torch.autograd.grad(outputs[-1].sum(), fused)[0])
    assert torch.equal(*gradients)


def test_has_no_parameters() -> None:
    assert not build().state_dict()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"attention_dropout": 0.1}, "--attention-dropout 0.1"),
        ({"window_size": (15, 15)}, "--window-size 15,15"),
        ({"window_size": (15, 0), "window_attn_skip_freq": 2}, "window_attn_skip_freq"),
        ({"softmax_type": "off-by-one"}, "--softmax-type off-by-one"),
        ({"apply_query_key_layer_scaling": True}, "--apply-query-key-layer-scaling"),
    ],
)
def test_refuses_what_it_cannot_do(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**overrides)


def test_refuses_a_batch_a_bias_and_another_cp_size() -> None:
    module = build()
    _, (query, key, value) = fused_projection()
    layout = LAYOUT.to_tensor()
    with pytest.raises(ValueError, match="a batch of 2"):
        module(*(x.expand(-1, 2, -1, -1) for x in (query, key, value)), layout)
    with pytest.raises(ValueError, match="attention_bias"):
        module(query, key, value, layout, attention_bias=torch.zeros(1))
    with pytest.raises(ValueError, match="laid out for 2 context-parallel ranks in a group of 1"):
        module(query, key, value, RowLayout(LAYOUT.documents, cp_size=2).to_tensor())
