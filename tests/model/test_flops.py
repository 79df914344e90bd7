"""Attention's share of the FLOPs is counted from the pairs that the mask lets through."""

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from megatron_longpo.attention.dense import dense_mask
from megatron_longpo.config import ModelConfig, Window
from megatron_longpo.data.layout import DocumentLayout, RowLayout
from megatron_longpo.model.flops import attended_pairs, forward_flops, step_flops


@given(
    documents=st.lists(
        st.builds(DocumentLayout, st.integers(1, 40), st.lists(st.integers(1, 12), max_size=3).map(tuple)),
        min_size=1,
        max_size=3,
    ),
    cp_size=st.sampled_from([1, 2]),
    window_tokens=st.none() | st.integers(1, 60),
)
def test_pairs_are_those_of_the_mask(documents: list[DocumentLayout], cp_size: int, window_tokens: int | None) -> None:
    layout = RowLayout(tuple(documents), cp_size, window_tokens=window_tokens)
    assert attended_pairs(layout) == dense_mask(layout).sum()


def test_the_models_window_counts() -> None:
    model = ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=2, window_size=Window(9, 0))
    layout = RowLayout((DocumentLayout(100, ()),))
    full = dataclasses.replace(model, window_size=Window())
    # 10 tokens each, but for the first 9: 4 * N * D per pair.
    saved = 100 * 101 // 2 - (100 * 10 - 45)
    assert forward_flops(full, layout, 0) - forward_flops(model, layout, 0) == 4 * 8 * saved


def test_a_step_by_hand() -> None:
    shape = {"num_layers": 3, "hidden_size": 8, "num_attention_heads": 4, "kv_channels": 6, "ffn_hidden_size": 20}
    grouped = {"group_query_attention": True, "num_query_groups": 2}
    layout = RowLayout((DocumentLayout(5, (2,)),), cp_size=2)  # 5 + 2 tokens, 15 + 10 + 3 pairs, and padding
    model = ModelConfig(**shape, **grouped, vocab_size=11)
    # Queries and output 8 x 24, keys and values 8 x 12, the MLP's three 8 x 20.
    layers = 3 * (2 * 7 * (2 * 8 * 24 + 2 * 8 * 12 + 3 * 8 * 20) + 4 * 24 * 28)
    assert step_flops(model, layout, 6) == 3 * (layers + 2 * 8 * 11 * 6)
