"""Training rows: no token of a conversation is lost, none of the shared ones is computed twice."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_longpo.data.document import Branch, ShortPrompt, TokenizedDocument, common_prefix_length
from megatron_longpo.data.rows import OBJECTIVE_ROLES, TrainingRow, short_rows, training_row
from tests.data.samples import random_document

documents = st.builds(random_document, st.integers(0, 10_000), st.integers(1, 4))


def sequences(row: TrainingRow) -> list[list[int]]:
    """Every conversation of a row, written out."""
    return [[*row.prefix.tolist(), *branch.tokens.tolist()] for branch in row.branches]


@given(documents, st.sampled_from(sorted(set(OBJECTIVE_ROLES.values()))))
def test_a_joint_row_holds_exactly_its_conversations(document: TokenizedDocument, roles: tuple[int, ...]) -> None:
    row = training_row(document, "joint", roles)
    assert document.joint is not None
    expected = [document.document_tokens.tolist() + document.joint[role].tokens.tolist() for role in roles]
    assert sequences(row) == expected
    assert [branch.role for branch in row.branches] == list(roles)
    first_response = min(document.joint[role].spans[0][1] for role in roles) + len(document.document_tokens)
    assert len(row.prefix) == min(first_response, common_prefix_length(*(np.array(s) for s in expected)))


@given(documents, st.sampled_from(sorted(set(OBJECTIVE_ROLES.values()))))
def test_an_independent_row_branches_every_turn_off_the_document(
    document: TokenizedDocument, roles: tuple[int, ...]
) -> None:
    row = training_row(document, "independent", roles)
    pairs = [(turn, role) for turn in range(document.num_turns) for role in roles]
    assert sequences(row) == [
        document.document_tokens.tolist() + document.independent[turn][role].tokens.tolist() for turn, role in pairs
    ]
    assert [(branch.spans[0][0], branch.role) for branch in row.branches] == pairs


@given(documents, st.sampled_from(["joint", "independent", "short"]))
def test_spans_still_hold_the_responses(document: TokenizedDocument, kind: str) -> None:
    rows = short_rows(document) if kind == "short" else [training_row(document, kind)]
    for row in rows:
        for branch in row.branches:
            for turn, start, end in branch.spans:
                assert 0 <= start < end <= len(branch.tokens)
                expected = document.independent[turn][branch.role].response(turn)
                assert branch.tokens[start:end].tolist() == expected.tolist()


@given(documents)
def test_short_rows_are_one_per_turn(document: TokenizedDocument) -> None:
    rows = short_rows(document, number=7)
    assert [row.branches[0].spans[0][0] for row in rows] == list(range(document.num_turns))
    assert all(row.number == 7 and row.num_turns == document.num_turns for row in rows)
    for row, short in zip(rows, document.short, strict=True):
        assert sequences(row)[0] == [*short.prefix_tokens.tolist(), *short.chosen.tokens.tolist()]


def test_shared_response_tokens_stay_in_the_branches() -> None:
    chosen = Branch(np.array([5, 1, 2, 3], dtype=np.int32), ((0, 1, 4),))
    rejected = Branch(np.array([5, 1, 2, 4], dtype=np.int32), ((0, 1, 4),))
    document = TokenizedDocument("same start", np.array([9], dtype=np.int32), (chosen, rejected), (), ())
    row = training_row(document, "joint")
    assert row.prefix.tolist() == [9, 5]
    assert [branch.tokens.tolist() for branch in row.branches] == [[1, 2, 3], [1, 2, 4]]


def test_a_row_knows_its_lengths() -> None:
    row = training_row(random_document(1, num_turns=2), "joint")
    assert row.num_tokens == len(row.prefix) + sum(len(branch.tokens) for branch in row.branches)
    assert row.longest_sequence_tokens == max(map(len, sequences(row)))
    assert row.layout.prefix_tokens == len(row.prefix)


def test_missing_conversations_are_named_with_the_fix() -> None:
    document = random_document(1)
    with pytest.raises(ValueError, match="--turns independent"):
        training_row(replace(document, joint=None), "joint")
    with pytest.raises(ValueError, match="--turns joint"):
        training_row(replace(document, independent=()), "independent")
    with pytest.raises(ValueError, match="both is unknown"):
        training_row(document, "both")
    with pytest.raises(ValueError, match=r"no short prompts.*short_prompt"):
        short_rows(replace(document, short=()))


def test_a_conversation_without_any_prompt_is_refused() -> None:
    nothing = np.zeros(0, dtype=np.int32)
    pair = [Branch(np.array([token], dtype=np.int32), ((0, 0, 1),)) for token in (1, 2)]
    document = TokenizedDocument("bare", nothing, (pair[0], pair[1]), (), (ShortPrompt(nothing, *pair),))
    with pytest.raises(ValueError, match=r"'bare'.*chat template"):
        training_row(document, "joint")
    with pytest.raises(ValueError, match=r"'bare'.*chat template"):
        short_rows(document)
