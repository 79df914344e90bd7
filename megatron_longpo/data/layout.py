"""Where every token of a training row lies: the shared-prefix layout and its context-parallel split.

A row holds one or more documents, one after another. Each document is a prefix that all of its branches share, then
the branches:

    [ P0 | B0.0 | B0.1 | … ][ P1 | B1.0 | B1.1 | … ] …

A prefix or a branch is a *segment*. A token attends causally inside its own segment, and a branch token also to the
whole prefix of its document; nothing else. Positions count from 0 in every prefix, and every branch of a document
starts at the prefix's length. A model with a sliding window sees no farther back than that many positions. Every
segment is padded at its end so that it splits into ``2 * cp`` equal chunks, of which context-parallel rank r holds
chunks r and ``2 * cp - 1 - r`` (zigzag: all ranks do equal attention work). Padding is known here and nowhere else:
attention, loss and counts see only the ``num_tokens`` of each segment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch

PREFIX = -1
"""The branch number of a prefix segment."""


@dataclass(frozen=True)
class DocumentLayout:
    """True token counts of one document: its shared prefix and the branches behind it."""

    prefix_tokens: int
    branch_tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.prefix_tokens < 1 or any(n < 1 for n in self.branch_tokens):
            raise ValueError(
                f"a document needs a prefix and branches of at least one token each, got prefix {self.prefix_tokens}, "
                f"branches {self.branch_tokens}"
            )

    @property
    def num_tokens(self) -> int:
        """Tokens of the document, padding excluded."""
        return self.prefix_tokens + sum(self.branch_tokens)


@dataclass(frozen=True)
class Segment:
    """One prefix or branch of a row."""

    document: int
    branch: int  # PREFIX, or the branch's number in its document
    start: int  # row index of the first token
    num_tokens: int  # true length
    padded_tokens: int  # length in the row
    first_position: int  # position id of the first token
    prefix_start: int  # row index of the document's prefix
    prefix_tokens: int  # its true length

    @property
    def stop(self) -> int:
        """Row index one past the last true token."""
        return self.start + self.num_tokens


@dataclass(frozen=True)
class RowLayout:
    """The segments of one row.

    Args:
        documents: True lengths of every document, in row order.
        cp_size: Context-parallel size; every segment is padded to a multiple of ``2 * cp_size`` (to nothing at 1).
        row_multiple: The padded row's length is a multiple of this too (``cp * tp`` with sequence parallel); the
            extra padding goes behind the first prefix.
        window_tokens: Tokens that a query sees, itself included, its positions counted back from its own; None is all.
            It is the model's, so data has none: attention puts it in (`from_tensor`).
        padding_cp_size: Segments are padded as for this context-parallel size, if not for ``cp_size`` (`over`).
    """

    documents: tuple[DocumentLayout, ...]
    cp_size: int = 1
    row_multiple: int = 1
    window_tokens: int | None = None
    padding_cp_size: int | None = None

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """All segments in row order."""
        cp_size = self.padding_cp_size or self.cp_size
        chunk = 2 * cp_size if cp_size > 1 else 1

        def padded(num_tokens: int) -> int:
            return -(-num_tokens // chunk) * chunk

        lengths = [padded(n) for d in self.documents for n in (d.prefix_tokens, *d.branch_tokens)]
        while sum(lengths) % self.row_multiple:
            lengths[0] += chunk
        segments: list[Segment] = []
        remaining, start = iter(lengths), 0
        for number, document in enumerate(self.documents):
            prefix_start = start
            for branch, num_tokens in enumerate((document.prefix_tokens, *document.branch_tokens), PREFIX):
                length = next(remaining)
                first_position = 0 if branch == PREFIX else document.prefix_tokens
                segments.append(
                    Segment(
                        number,
                        branch,
                        start,
                        num_tokens,
                        length,
                        first_position,
                        prefix_start,
                        document.prefix_tokens,
                    )
                )
                start += length
        return tuple(segments)

    def over(self, cp_size: int) -> RowLayout:
        """The same padded row over fewer ranks, of which each holds what a run of this layout's ranks holds together.

        Args:
            cp_size: A divisor of ``self.cp_size``.
        """
        assert self.cp_size % cp_size == 0
        return replace(self, cp_size=cp_size, padding_cp_size=self.cp_size)

    @property
    def padded_tokens(self) -> int:
        """Length of the whole row, padding included."""
        last = self.segments[-1]
        return last.start + last.padded_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole row, padding excluded."""
        return sum(document.num_tokens for document in self.documents)

    @property
    def local_tokens(self) -> int:
        """Tokens that one context-parallel rank holds, padding included."""
        return self.padded_tokens // self.cp_size

    def of_document(self, document: int) -> Iterator[Segment]:
        """The segments of one document, its prefix first."""
        return (s for s in self.segments if s.document == document)

    def segments_behind(self, keys: Segment) -> Iterator[Segment]:
        """The segments whose tokens may attend to a segment's: itself, and behind a prefix its branches."""
        return self.of_document(keys.document) if keys.branch == PREFIX else iter((keys,))

    def position_ids(self) -> torch.Tensor:
        """Position ids of the padded row: int64 ``[padded_tokens]``. Padding counts on, so it stays in RoPE's range."""
        return torch.cat([torch.arange(s.padded_tokens) + s.first_position for s in self.segments])

    def chunks(self, cp_rank: int) -> Iterator[tuple[Segment, int, int]]:
        """The pieces that one rank holds, in its local order: (segment, first row index, one past the last)."""
        for segment in self.segments:
            if self.cp_size == 1:
                yield segment, segment.start, segment.start + segment.padded_tokens
                continue
            size = segment.padded_tokens // (2 * self.cp_size)
            for chunk in (cp_rank, 2 * self.cp_size - 1 - cp_rank):
                yield segment, segment.start + chunk * size, segment.start + (chunk + 1) * size

    def local_index(self, cp_rank: int) -> torch.Tensor:
        """Row indices that one rank holds, in its local order: int64 ``[local_tokens]``, CPU."""
        return torch.cat([torch.arange(start, stop) for _, start, stop in self.chunks(cp_rank)])

    def gathered_index(self) -> torch.Tensor:
        """For each row index, its place in the concatenation of all ranks' local orders: int64 ``[padded_tokens]``."""
        order = torch.cat([self.local_index(rank) for rank in range(self.cp_size)])
        return torch.argsort(order)

    def to_tensor(self) -> torch.Tensor:
        """The layout as a small int64 CPU tensor, in which form it travels through Megatron's layers and checkpoints.

        Megatron's ``attention_mask`` argument carries it: the activation-recompute functions save tensors only. The
        window stays behind: every layer knows its own.
        """
        assert self.padding_cp_size is None, "only a batch's own layout travels"
        numbers = [self.cp_size, self.row_multiple]
        for document in self.documents:
            numbers += [len(document.branch_tokens), document.prefix_tokens, *document.branch_tokens]
        return torch.tensor(numbers, dtype=torch.int64)

    @staticmethod
    def from_tensor(encoded: torch.Tensor, window_tokens: int | None = None) -> RowLayout:
        """The inverse of `to_tensor`, with a model's window; equal layouts give the same cached object."""
        return _decode(tuple(encoded.tolist()), window_tokens)


@lru_cache(maxsize=64)
def _decode(numbers: Sequence[int], window_tokens: int | None) -> RowLayout:
    cp_size, row_multiple, *rest = numbers
    documents = []
    while rest:
        num_branches, prefix_tokens, *rest = rest
        documents.append(DocumentLayout(prefix_tokens, tuple(rest[:num_branches])))
        rest = rest[num_branches:]
    return RowLayout(tuple(documents), cp_size, row_multiple, window_tokens)
