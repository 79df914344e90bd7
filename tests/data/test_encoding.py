"""SharedPrefixEncoder: the same tokens and offsets as encoding from scratch, for less work."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_longpo.data.chat_tokenizer import ChatTokenizer
from megatron_longpo.data.encoding import SharedPrefixEncoder, common_prefix_chars


class Counting:
    """A tokenizer that counts the characters it encodes."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self.tokenizer = tokenizer
        self.num_chars = 0

    def encode(self, text: str):
        self.num_chars += len(text)
        return self.tokenizer.encode(text)


def assert_same(tokenizer: ChatTokenizer, texts: list[str]) -> int:
    """Encode all texts with one encoder, compare with encoding each alone, and return the characters it encoded."""
    counting = Counting(tokenizer)
    encoder = SharedPrefixEncoder(counting)  # type: ignore[arg-type]
    for text in texts:
        for mine, theirs in zip(encoder.encode(text), tokenizer.encode(text), strict=True):
            assert np.array_equal(mine, theirs)
    return counting.num_chars


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=8, deadline=None)
@given(data=st.data())
def test_random_endings_of_a_long_text(tokenizer: ChatTokenizer, text: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, 100_000))
    document = text[start : start + data.draw(st.integers(30_000, 50_000))]
    endings = data.draw(st.lists(st.text(max_size=50), min_size=2, max_size=3))
    assert_same(tokenizer, [f"<s>[INST] {document}{ending}" for ending in endings])


def test_conversations_of_a_document_cost_one_document(tokenizer: ChatTokenizer, text: str) -> None:
    document = text[:200_000]
    texts = [tokenizer.render([{"role": "user", "content": f"{document}\n\nQuestion {i}?"}]) for i in range(6)]
    assert assert_same(tokenizer, texts) < 1.3 * len(document)


@pytest.mark.parametrize("unit", ["=", " ", "ab", "\n", "✓", "aaaaaaab"])
def test_texts_without_boundaries_are_still_encoded_exactly(tokenizer: ChatTokenizer, unit: str) -> None:
    """Runs far longer than any margin: the merges inside them may depend on text at any distance."""
    run = unit * (40_000 // len(unit))
    assert_same(tokenizer, [run + ending for ending in ("", "=", "x", unit, unit + unit[0], "\nend")])


def test_text_that_changes_in_the_middle(tokenizer: ChatTokenizer, text: str) -> None:
    rng = random.Random(0)
    pieces = [text[:60_000]]
    for _ in range(4):
        at = rng.randrange(60_000)
        pieces.append(pieces[-1][:at] + "CHANGED" + pieces[-1][at:])
    assert_same(tokenizer, pieces)


@given(st.text(max_size=30), st.text(max_size=5), st.text(max_size=5))
def test_common_prefix_by_bisection(shared: str, first: str, second: str) -> None:
    one, other = shared + first, shared + second
    length = common_prefix_chars(one, other)
    assert one[:length] == other[:length]
    assert length == min(len(one), len(other)) or one[length] != other[length]
