"""Tokenized documents: lengths, responses, and what several sequences share."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_longpo.data.document import Branch, common_prefix_length
from tests.data.samples import random_document

sequences = st.lists(st.lists(st.integers(0, 2), max_size=12), min_size=1, max_size=4)


@given(sequences)
def test_common_prefix_length_against_the_definition(lists: list[list[int]]) -> None:
    length = common_prefix_length(*(np.array(items, dtype=np.int32) for items in lists))
    assert all(items[:length] == lists[0][:length] for items in lists)
    longer = [items[: length + 1] for items in lists]
    assert any(len(items) == length for items in lists) or any(items != longer[0] for items in longer)


def test_a_document_knows_its_turns_and_its_longest_conversation() -> None:
    document = random_document(3, num_turns=3, prefix=30)
    assert document.joint is not None
    assert document.num_turns == 3
    longest = max(len(branch.tokens) for pair in (document.joint, *document.independent) for branch in pair)
    assert document.longest_sequence_tokens == 30 + longest
    prompts = [(s.prefix_tokens, branch.tokens) for s in document.short for branch in (s.chosen, s.rejected)]
    assert document.longest_short_tokens == max(len(prompt) + len(tokens) for prompt, tokens in prompts)
    assert replace(document, short=()).longest_short_tokens == 0


def test_documents_are_equal_to_the_last_token() -> None:
    document, again = (random_document(3, num_turns=2) for _ in range(2))
    assert document == again and document.joint is not None
    (chosen, rejected), short = document.joint, document.short[1]
    other = replace(chosen, tokens=chosen.tokens + (np.arange(len(chosen.tokens)) == len(chosen.tokens) - 1))
    changes = {
        "id": "another",
        "document_tokens": document.document_tokens[:-1],
        "joint": (other, rejected),
        "independent": document.independent[::-1],
        "short": (document.short[0], replace(short, prefix_tokens=short.prefix_tokens[1:])),
    }
    for field, value in changes.items():
        assert replace(document, **{field: value}) != document, field
    assert replace(chosen, spans=chosen.spans[:1]) != chosen and replace(short, chosen=other) != short


def test_a_branch_finds_the_response_of_a_turn() -> None:
    branch = Branch(np.arange(10, dtype=np.int32), ((0, 1, 3), (2, 5, 9)))
    assert branch.response(2).tolist() == [5, 6, 7, 8]
    with pytest.raises(KeyError):
        branch.response(1)
