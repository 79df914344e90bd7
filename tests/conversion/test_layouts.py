"""Merging and splitting are inverse, and shards are parts of the whole, for any shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_longpo.config import ModelConfig
from megatron_longpo.conversion.layouts import (
    WHOLE,
    Columns,
    GateUp,
    Layout,
    QueryKeyValue,
    Replicated,
    Shard,
    Sliceable,
    Vocabulary,
)

LAYOUTS: list[Layout] = [
    Replicated(),
    Replicated(width="kv_channels"),
    Columns(attention=True),
    Columns(attention=False),
    QueryKeyValue(),
    QueryKeyValue(bias=True),
    GateUp(),
    Vocabulary(),
]


def merge(
    layout: Layout, sources: Sequence[Sliceable], model: ModelConfig, padded_vocab: int, shard: Shard = WHOLE
) -> torch.Tensor:
    """A shard of the Megatron parameter, written over garbage."""
    out = torch.full(layout.shape(model, padded_vocab, shard), torch.nan)
    layout.merge_into(out, sources, model, shard)
    return out


@st.composite
def shapes(draw: st.DrawFn) -> tuple[ModelConfig, int]:
    """A model and a TP size that divides it."""
    tp = draw(st.sampled_from([1, 2, 3, 4]))
    groups, queries = tp * draw(st.integers(1, 3)), draw(st.integers(1, 3))
    model = ModelConfig(
        num_layers=1,
        hidden_size=draw(st.integers(1, 7)),
        ffn_hidden_size=tp * draw(st.integers(1, 5)),
        num_attention_heads=groups * queries,
        kv_channels=draw(st.integers(1, 4)),
        group_query_attention=queries > 1,
        num_query_groups=groups,
        vocab_size=draw(st.integers(1, 30)),
        make_vocab_size_divisible_by=draw(st.integers(1, 5)),
    )
    return model, tp


@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
@given(case=shapes())
def test_split_undoes_merge_and_shards_join(layout: Layout, case: tuple[ModelConfig, int]) -> None:
    model, tp = case
    padded = model.padded_vocab_size(tp)
    sources = [torch.randn(shape) for shape in layout.hf_shapes(model)]
    whole = merge(layout, sources, model, padded)
    assert tuple(whole.shape) == layout.shape(model, padded)
    parts = layout.split(whole, model)
    assert all(part.equal(source) for part, source in zip(parts, sources, strict=True))

    shards = [merge(layout, sources, model, padded, Shard(rank, tp)) for rank in range(tp)]
    assert all(tuple(shard.shape) == layout.shape(model, padded, Shard(0, tp)) for shard in shards)
    if isinstance(layout, Replicated):
        assert all(shard.equal(whole) for shard in shards)
    elif isinstance(layout, GateUp):
        gates, ups = zip(*(shard.chunk(2) for shard in shards), strict=True)
        assert torch.cat((*gates, *ups)).equal(whole)
    else:
        assert torch.cat(shards, dim=1 if isinstance(layout, Columns) else 0).equal(whole)


class Recorded:
    """A source that notes how many values were read of it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.num_read = tensor, 0

    def __getitem__(self, key: Any) -> torch.Tensor:
        part = self.tensor[key]
        self.num_read += part.numel()
        return part


@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
@given(case=shapes())
def test_ranks_read_their_own_parts_and_nothing_else(layout: Layout, case: tuple[ModelConfig, int]) -> None:
    model, tp = case
    sources = [Recorded(torch.randn(shape)) for shape in layout.hf_shapes(model)]
    for rank in range(tp):
        merge(layout, sources, model, model.padded_vocab_size(tp), Shard(rank, tp))
    every = tp if isinstance(layout, Replicated) else 1
    assert [source.num_read for source in sources] == [every * source.tensor.numel() for source in sources]


def test_queries_of_a_group_come_before_its_key_and_value() -> None:
    """Written out for 4 query heads in 2 groups of head dimension 1: q0 q1 k0 v0 q2 q3 k1 v1."""
    model = ModelConfig(
        hidden_size=1, num_attention_heads=4, kv_channels=1, group_query_attention=True, num_query_groups=2
    )
    queries, keys, values = torch.tensor([0.0, 1, 2, 3]), torch.tensor([10.0, 11]), torch.tensor([20.0, 21])
    merged = merge(QueryKeyValue(bias=True), [queries, keys, values], model, 0)
    assert merged.tolist() == [0, 1, 10, 20, 2, 3, 11, 21]


def test_padding_of_the_vocabulary_is_zero_and_lies_behind_it() -> None:
    model = ModelConfig(hidden_size=2, vocab_size=5, make_vocab_size_divisible_by=4)
    rows = torch.arange(1.0, 11).view(5, 2)
    assert merge(Vocabulary(), [rows], model, 16, Shard(0, 2)).tolist() == [*rows.tolist(), [0, 0], [0, 0], [0, 0]]
    assert merge(Vocabulary(), [rows], model, 16, Shard(1, 2)).abs().max() == 0
