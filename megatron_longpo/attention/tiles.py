"""Cut the attention of a row into kernel calls: squares with a causal mask and full rectangles, nothing else.

    prefix on itself      causal square
    branches on prefix    one rectangle for all branches of a document that lie side by side
    branch on itself      causal square

Under context parallelism a rank holds zigzag chunks of every segment as queries, with all keys at hand. A chunk then
attends by a rectangle to the earlier chunks of its segment and by a causal square to itself.

A sliding window that is shorter than a document cuts its queries into blocks no longer than the window; a block attends
by a causal square to itself, and to what it sees before itself by the shapes of `band.before`, of which one is a causal
square backwards in time. A window that is not shorter changes nothing.

A plan is pure integers, covers every allowed (query, key) pair exactly once and never touches padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, pairwise

from megatron_longpo.attention.band import Span, before
from megatron_longpo.data.layout import PREFIX, RowLayout, Segment


@dataclass(frozen=True)
class Tile:
    """One kernel call: a range of the local queries on a range of the row's keys.

    ``query_span`` is where the queries lie in the local query tensor, ``key_span`` the keys in the whole row's tensors.
    Only squares are ``causal``, and only those are ``flipped``: their queries and keys count backwards in time.
    ``queries_first`` says that no earlier tile of the plan has any of these queries, ``keys_first`` the same of its
    keys: such a tile may store its result, where others must merge or add theirs to what is there. ``of_branch`` tells
    a branch's queries from a prefix's, for profiles.
    """

    query_span: Span
    key_span: Span
    causal: bool
    queries_first: bool
    keys_first: bool
    of_branch: bool
    flipped: bool = False

    @property
    def queries(self) -> slice:
        """Rows of the local query tensor."""
        return slice(*self.query_span)

    @property
    def keys(self) -> slice:
        """Rows of the whole row's key and value tensors."""
        return slice(*self.key_span)


@dataclass(frozen=True, eq=False)
class Plan:
    """The tiles of one rank, in the order to compute them.

    Compared by identity: what is derived from a plan is cached by it.

    Args:
        tiles: The kernel calls.
        unstored_queries: Ranges of local queries that no ``queries_first`` tile stores to: padding. They hold zero.
        unstored_keys: Ranges of keys that no ``keys_first`` tile stores to. Their gradients start from zero.
    """

    tiles: tuple[Tile, ...]
    unstored_queries: tuple[Span, ...]
    unstored_keys: tuple[Span, ...]

    @property
    def adds_keys(self) -> bool:
        """Whether several tiles share a key, so that their gradients add up."""
        return not all(tile.keys_first for tile in self.tiles)


@dataclass(frozen=True)
class Run:
    """Neighbouring true tokens of a segment that a rank holds: ``local`` is their place there, ``row`` in the row."""

    segment: Segment
    local: int
    row: int
    length: int

    @property
    def place(self) -> Span:
        """Where the rank holds them."""
        return self.local, self.local + self.length

    @property
    def position(self) -> int:
        """Position of the first token."""
        return self.segment.first_position + self.row - self.segment.start

    def overlap(self, start: int, stop: int) -> Run | None:
        """The part that lies in a range of row indices, None for an empty one."""
        first, last = max(start, self.row), min(stop, self.row + self.length)
        return Run(self.segment, self.local + first - self.row, first, last - first) if first < last else None

    def blocks(self, length: int) -> Iterator[Run]:
        """The run in pieces of this length, the last one shorter."""
        for skipped in range(0, self.length, length):
            rest = min(length, self.length - skipped)
            yield Run(self.segment, self.local + skipped, self.row + skipped, rest)


@lru_cache(maxsize=256)
def plan(layout: RowLayout, cp_rank: int | None = None) -> Plan:
    """The tiles of one context-parallel rank, or of the whole row.

    Args:
        layout: The row.
        cp_rank: Queries are the zigzag chunks of this rank, in its local order. None: queries are the whole padded row
            in row order, as they are at size 1 and after heads were exchanged for tokens.

    Returns:
        The plan, cached: equal layouts share one.
    """
    tiles: list[Tile] = []
    for _, runs in groupby(held_runs(layout, cp_rank), key=lambda run: run.segment.document):
        tiles += _of_document(list(runs), layout)
    num_queries = layout.padded_tokens if cp_rank is None else layout.local_tokens
    return Plan(
        tuple(tiles),
        complement([t.query_span for t in tiles if t.queries_first], num_queries),
        complement([t.key_span for t in tiles if t.keys_first], layout.padded_tokens),
    )


def held_runs(layout: RowLayout, cp_rank: int | None) -> Iterator[Run]:
    """The true tokens that a rank holds, in local order; chunks that are neighbours in the row come as one run."""
    if cp_rank is None:
        yield from (Run(segment, segment.start, segment.start, segment.num_tokens) for segment in layout.segments)
        return
    previous: Run | None = None
    local = 0
    for segment, start, stop in layout.chunks(cp_rank):
        run = Run(segment, local, start, min(stop, segment.stop) - start)
        local += stop - start
        if run.length <= 0:
            continue
        if previous and previous.segment == segment and previous.row + previous.length == start:
            run = Run(segment, previous.local, previous.row, previous.length + run.length)
        elif previous:
            yield previous
        previous = run
    if previous:
        yield previous


def _of_document(runs: list[Run], layout: RowLayout) -> list[Tile]:
    """The tiles of one document, which shares no query and no key with another."""
    document = layout.documents[runs[0].segment.document]
    longest = document.prefix_tokens + max(document.branch_tokens, default=0)
    if layout.window_tokens is not None and layout.window_tokens < longest:
        return list(_windowed(runs, layout.window_tokens))
    tiles: list[Tile] = []
    for queries, keys, causal in _shapes(runs):
        queries_first = all(disjoint(queries, t.query_span) for t in tiles)
        keys_first = all(disjoint(keys, t.key_span) for t in tiles)
        of_branch = any(run.segment.branch != PREFIX and run.local == queries[0] for run in runs)
        tiles.append(Tile(queries, keys, causal, queries_first, keys_first, of_branch))
    return tiles


def _shapes(runs: list[Run]) -> Iterator[tuple[Span, Span, bool]]:
    """Queries, keys and whether the mask is causal, of every tile of a document in the order to compute them.

    The longest key ranges come first, so that later gradients mostly add to what an earlier tile has stored.
    """
    yield from _on_prefix(run for run in runs if run.segment.branch != PREFIX)
    for run in reversed(runs):
        if run.row > run.segment.start:
            yield run.place, (run.segment.start, run.row), False
        yield run.place, (run.row, run.row + run.length), True


def _on_prefix(branch_runs: Iterable[Run]) -> Iterator[tuple[Span, Span, bool]]:
    """Rectangles of one document's branches on its whole prefix; runs side by side share one."""
    pending: Span | None = None
    keys = (0, 0)
    for run in branch_runs:
        keys = (run.segment.prefix_start, run.segment.prefix_start + run.segment.prefix_tokens)
        if pending and pending[1] == run.local:
            pending = (pending[0], run.local + run.length)
            continue
        if pending:
            yield pending, keys, False
        pending = run.place
    if pending:
        yield pending, keys, False


def _windowed(runs: list[Run], window_tokens: int) -> Iterator[Tile]:
    """The tiles of one document under a window that is shorter than it.

    The causal squares come first: they hold every query and share no key, so they may all store and the rest may add.
    """
    blocks = [block for run in runs for block in run.blocks(window_tokens)]
    for block in blocks:
        own = block.row, block.row + block.length
        yield Tile(block.place, own, True, True, True, of_branch=block.segment.branch != PREFIX)
    for block in blocks:
        segment, first = block.segment, block.position
        # Keys by position, and the row index of position 0.
        sources = [((segment.first_position, first), segment.start - segment.first_position)]
        if segment.branch != PREFIX:
            sources.append(((0, segment.prefix_tokens), segment.prefix_start))
        for keys, origin in sources:
            for (start, stop), (key_start, key_stop), flipped in before(
                (first, first + block.length), keys, window_tokens
            ):
                yield Tile(
                    (block.local + start - first, block.local + stop - first),
                    (origin + key_start, origin + key_stop),
                    causal=flipped,
                    queries_first=False,
                    keys_first=False,
                    of_branch=segment.branch != PREFIX,
                    flipped=flipped,
                )


def disjoint(a: Span, b: Span) -> bool:
    """Whether two spans ``[start, stop)`` share no place."""
    return a[1] <= b[0] or b[1] <= a[0]


def complement(spans: Iterable[Span], length: int) -> tuple[Span, ...]:
    """The ranges of ``range(length)`` outside disjoint spans."""
    edges = [(0, 0), *sorted(spans), (length, length)]
    return tuple((stop, start) for (_, stop), (start, _) in pairwise(edges) if stop < start)
