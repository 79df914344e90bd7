"""How one Megatron parameter is made of Hugging Face tensors, and taken apart again.

A layout knows the shapes on both sides and which part of a parameter a tensor-parallel rank holds. It reads from
anything that slices like a tensor, so that a rank touches only its own part of a file. No layout does arithmetic:
`merge_into` and `split` move values, and give them back bit for bit.
"""

# H=hidden_size F=ffn_hidden_size V=vocab_size N=query heads G=key/value heads D=head_dim

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from megatron_longpo.config import ModelConfig

Shape = tuple[int, ...]


class Sliceable(Protocol):
    """A tensor, or a slice reader of a file: ``[a:b]`` cuts rows, ``[:, a:b]`` cuts columns."""

    def __getitem__(self, key: Any, /) -> torch.Tensor: ...


@dataclass(frozen=True)
class Shard:
    """One of ``size`` equal parts along the axis that tensor parallelism splits."""

    rank: int = 0
    size: int = 1

    def of(self, length: int) -> slice:
        """The part of an axis of this length, which ``size`` divides."""
        part = length // self.size
        return slice(self.rank * part, (self.rank + 1) * part)


WHOLE = Shard()


class Layout(Protocol):
    """The interface of all layouts below."""

    def hf_shapes(self, model: ModelConfig) -> tuple[Shape, ...]:
        """Shapes of the Hugging Face tensors."""

    def shape(self, model: ModelConfig, padded_vocab: int, shard: Shard = WHOLE) -> Shape:
        """Shape of a shard of the Megatron parameter whose vocabulary is padded to ``padded_vocab`` rows."""

    def merge_into(
        self, out: torch.Tensor, sources: Sequence[Sliceable], model: ModelConfig, shard: Shard = WHOLE
    ) -> None:
        """Write a shard of the Megatron parameter, read from Hugging Face tensors, over ``out``, which has its shape.

        Rows go straight from a file to their place, cast to its type: merging makes no tensor.
        """

    def split(self, whole: torch.Tensor, model: ModelConfig) -> tuple[torch.Tensor, ...]:
        """The Hugging Face tensors in a whole Megatron parameter."""


@dataclass(frozen=True)
class Replicated:
    """A vector that every tensor-parallel rank holds whole: the weight of a norm.

    Args:
        width: Field of `ModelConfig` that is its length.
    """

    width: str = "hidden_size"

    def hf_shapes(self, model: ModelConfig) -> tuple[Shape, ...]:
        """One vector ``[width]``."""
        return ((getattr(model, self.width),),)

    def shape(self, model: ModelConfig, padded_vocab: int, shard: Shard = WHOLE) -> Shape:
        """``[width]`` on every shard."""
        return self.hf_shapes(model)[0]

    def merge_into(
        self, out: torch.Tensor, sources: Sequence[Sliceable], model: ModelConfig, shard: Shard = WHOLE
    ) -> None:
        """Copy the whole vector, whatever the shard."""
        out.copy_(sources[0][:])

    def split(self, whole: torch.Tensor, model: ModelConfig) -> tuple[torch.Tensor, ...]:
        """The vector itself."""
        return (whole,)


@dataclass(frozen=True)
class Columns:
    """A row-parallel linear ``[H, input]``: tensor parallelism splits the input, so the columns.

    Args:
        attention: The input is the heads' output ``N * D``; else the MLP's ``F``.
    """

    attention: bool

    def _input(self, model: ModelConfig) -> int:
        return model.query_width if self.attention else model.ffn_hidden_size

    def hf_shapes(self, model: ModelConfig) -> tuple[Shape, ...]:
        """One matrix ``[H, input]``."""
        return ((model.hidden_size, self._input(model)),)

    def shape(self, model: ModelConfig, padded_vocab: int, shard: Shard = WHOLE) -> Shape:
        """``[H, input / size]``."""
        return (model.hidden_size, self._input(model) // shard.size)

    def merge_into(
        self, out: torch.Tensor, sources: Sequence[Sliceable], model: ModelConfig, shard: Shard = WHOLE
    ) -> None:
        """Copy the shard's columns."""
        out.copy_(sources[0][:, shard.of(self._input(model))])

    def split(self, whole: torch.Tensor, model: ModelConfig) -> tuple[torch.Tensor, ...]:
        """The matrix itself."""
        return (whole,)


@dataclass(frozen=True)
class QueryKeyValue:
    """Queries, keys and values in one column-parallel linear, interleaved per key/value head.

    Rows of Megatron's weight: for every group its N / G query heads, then its key head, then its value head; so a
    tensor-parallel rank that holds whole groups holds consecutive rows.

    Args:
        bias: The bias vectors instead of the weights.
    """

    bias: bool = False

    def hf_shapes(self, model: ModelConfig) -> tuple[Shape, ...]:
        """``[N * D, H]``, ``[G * D, H]`` and ``[G * D, H]``; of biases without H."""
        columns = () if self.bias else (model.hidden_size,)
        heads = (model.num_attention_heads, model.num_query_groups, model.num_query_groups)
        return tuple((count * model.kv_channels, *columns) for count in heads)

    def shape(self, model: ModelConfig, padded_vocab: int, shard: Shard = WHOLE) -> Shape:
        """``[(N + 2 G) D / size, H]``; of biases without H."""
        shapes = self.hf_shapes(model)
        return (sum(shape[0] for shape in shapes) // shard.size, *shapes[0][1:])

    def merge_into(
        self, out: torch.Tensor, sources: Sequence[Sliceable], model: ModelConfig, shard: Shard = WHOLE
    ) -> None:
        """Copy the rows of the shard's groups: per group those of its queries, its key and its value."""
        per_group = out.view(model.num_query_groups // shard.size, -1, *out.shape[1:])
        start = 0
        for source, shape in zip(sources, self.hf_shapes(model), strict=True):
            rows = source[shard.of(shape[0])].unflatten(0, (len(per_group), -1))
            per_group[:, start : start + rows.shape[1]].copy_(rows)
            start += rows.shape[1]

    def split(self, whole: torch.Tensor, model: ModelConfig) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values, each with the rows of all groups behind one another."""
        groups, columns = model.num_query_groups, whole.shape[1:]
        per_group = whole.reshape(groups, -1, *columns)
        queries = model.num_attention_heads // groups * model.kv_channels
        parts = per_group.split([queries, model.kv_channels, model.kv_channels], dim=1)
        return tuple(part.reshape(-1, *columns) for part in parts)


@dataclass(frozen=True)
class GateUp:
    """The MLP's gate and up projections ``[F, H]``, stacked; a rank holds its part of the gate above its part of up."""

    def hf_shapes(self, model: ModelConfig) -> tuple[Shape, ...]:
        """Gate and up, ``[F, H]`` each."""
        return ((model.ffn_hidden_size, model.hidden_size),) * 2

    def shape(self, model: ModelConfig, padded_vocab: int, shard: Shard = WHOLE) -> Shape:
        """``[2 F / size, H]``."""
        return (2 * model.ffn_hidden_size // shard.size, model.hidden_size)

    def merge_into(
        self, out: torch.Tensor, sources: Sequence[Sliceable], model: ModelConfig, shard: Shard = WHOLE
    ) -> None:
        """Copy the shard's rows of the gate into the upper half, those of up into the lower."""
        for half, source in zip(out.chunk(2), sources, strict=True):
            half.copy_(source[shard.of(model.ffn_hidden_size)])

    def split(self, whole: torch.Tensor, model: ModelConfig) -> tuple[torch.Tensor, ...]:
        """Gate and up, ``[F, H]`` each, of a whole parameter, whose halves they are."""
        gate, up = whole.chunk(2)
        return gate, up


@dataclass(frozen=True)
class Vocabulary:
    """The embedding or the LM head ``[V, H]``, with rows of zeros up to a size that tensor parallelism divides."""

    def hf_shapes(self, model: ModelConfig) -> tuple[Shape, ...]:
        """One matrix ``[V, H]``."""
        return ((model.vocab_size, model.hidden_size),)

    def shape(self, model: ModelConfig, padded_vocab: int, shard: Shard = WHOLE) -> Shape:
        """``[padded_vocab / size, H]``."""
        return (padded_vocab // shard.size, model.hidden_size)

    def merge_into(
        self, out: torch.Tensor, sources: Sequence[Sliceable], model: ModelConfig, shard: Shard = WHOLE
    ) -> None:
        """Copy the shard's rows that are tokens and zero those behind them."""
        first = shard.rank * len(out)
        num_true = max(0, min(len(out), model.vocab_size - first))
        out[:num_true].copy_(sources[0][first : first + num_true])
        out[num_true:].zero_()

    def split(self, whole: torch.Tensor, model: ModelConfig) -> tuple[torch.Tensor, ...]:
        """The rows that are tokens, without the padding."""
        return (whole[: model.vocab_size],)
