"""What a sliding window leaves of the keys that lie before a block of queries, cut into shapes that kernels compute.

A query at position p sees the W keys from p - W + 1 to p. For a block of at most W neighbouring queries the keys before
it are of two kinds: the later ones are seen by the whole block, a full rectangle; the earlier ones fall out of sight
one after another, a triangle in which a query sees its own key and those after it. Read backwards in time, queries and
keys both, that triangle is a causal square.
"""

from __future__ import annotations

from collections.abc import Iterator

Span = tuple[int, int]
"""First position and one past the last."""


def before(queries: Span, keys: Span, window_tokens: int) -> Iterator[tuple[Span, Span, bool]]:
    """The parts of the band in which a block of queries sees keys before it.

    Args:
        queries: At most ``window_tokens`` of them.
        keys: Any that end where the queries begin, or earlier.
        window_tokens: W, the keys that a query sees, itself included.

    Yields:
        Queries, keys, and whether the part is a causal square backwards in time; else it is a full rectangle. Together
        they hold every visible pair once.
    """
    first, stop = queries
    assert 0 < stop - first <= window_tokens and keys[1] <= first, (queries, keys, window_tokens)
    seen_by_all = max(keys[0], stop - window_tokens)
    if seen_by_all < keys[1]:
        yield queries, (seen_by_all, keys[1]), False
    leaving = max(keys[0], first - window_tokens + 1), min(keys[1], stop - window_tokens)
    if leaving[0] >= leaving[1]:
        return
    # The key at position k is last seen by the query at k + W - 1.
    last_seen = leaving[0] + window_tokens - 1, leaving[1] + window_tokens - 1
    if first < last_seen[0]:
        yield (first, last_seen[0]), leaving, False
    yield last_seen, leaving, True
