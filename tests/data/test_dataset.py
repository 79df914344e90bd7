"""PreferenceDataset: rows by number, vocabulary check, and a split that belongs to the documents."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_longpo.data.dataset import PreferenceDataset, held_out_documents
from megatron_longpo.data.document import TokenizedDocument
from megatron_longpo.data.records import RecordWriter
from tests.data.samples import random_document


def make(prefix: Path, documents: list[TokenizedDocument]) -> PreferenceDataset:
    with RecordWriter(prefix) as writer:
        for document in documents:
            writer.add(document)
        writer.finish(tokenizer={"path": "some/tokenizer"})
    return PreferenceDataset(prefix)


@pytest.fixture
def dataset(tmp_path: Path) -> PreferenceDataset:
    return make(tmp_path / "pairs", [random_document(seed, num_turns=2) for seed in range(20)])


def test_rows_carry_the_documents_number(dataset: PreferenceDataset) -> None:
    assert len(dataset) == 20
    row = dataset.row(13, "joint")
    assert (row.id, row.number) == ("document-13", 13)
    assert row.num_tokens == dataset.row_tokens("joint")[13]
    assert [row.number for row in dataset.short_rows(13)] == [13, 13]
    assert dataset[13] == random_document(13, num_turns=2)


def test_lengths_of_a_missing_kind_are_an_error(tmp_path: Path) -> None:
    dataset = make(tmp_path / "pairs", [replace(random_document(0), joint=None)])
    assert len(dataset.row_tokens("independent")) == 1
    with pytest.raises(ValueError, match="--turns independent"):
        dataset.row_tokens("joint")
    with pytest.raises(ValueError, match="--turns both"):
        dataset.row_tokens("both")


def test_a_token_beyond_the_vocabulary_names_both(dataset: PreferenceDataset) -> None:
    largest = dataset.manifest.max_token_id
    PreferenceDataset(dataset.prefix, vocab_size=largest + 1)
    with pytest.raises(ValueError, match=f"token id {largest} .*vocabulary has {largest} .*some/tokenizer"):
        PreferenceDataset(dataset.prefix, vocab_size=largest)


@pytest.mark.parametrize("changes", [{}, {"joint": None}, {"independent": ()}])
@pytest.mark.parametrize("roles", [(0, 1), (0,), (1,)])
def test_lengths_are_checked_without_the_tokens(tmp_path: Path, changes: dict, roles: tuple[int, ...]) -> None:
    documents = [replace(random_document(n, num_turns=n % 3 + 1), **changes) for n in range(9)]
    dataset = make(tmp_path / "pairs", documents)
    for turns in [kind for kind in ("joint", "independent") if dataset.manifest.row_tokens[kind]]:
        longest = [dataset.row(n, turns, roles).longest_sequence_tokens for n in range(9)]
        dataset.check_lengths(range(9), turns, roles, max(longest))
        for n in range(9):
            message = f"'document-{n}' has a conversation of {longest[n]} tokens, above --seq-length"
            with pytest.raises(ValueError, match=message):
                dataset.check_lengths([n], turns, roles, longest[n] - 1)
        others = [n for n in range(9) if longest[n] < max(longest)]
        dataset.check_lengths(others, turns, roles, max(longest) - 1)
        with pytest.raises(ValueError, match=f"'document-{longest.index(max(longest))}' has"):
            dataset.check_lengths(range(9), turns, roles, max(longest) - 1)


def test_the_split_follows_the_documents_not_their_order(dataset: PreferenceDataset, tmp_path: Path) -> None:
    shuffled = make(tmp_path / "shuffled", [dataset[number] for number in range(19, -1, -1)])
    for one, other in zip(dataset.split("80,20"), shuffled.split("80,20"), strict=True):
        assert {dataset[number].id for number in one} == {shuffled[number].id for number in other}


def test_the_split_covers_every_document_once(dataset: PreferenceDataset) -> None:
    parts = dataset.split("70,30")
    assert [len(part) for part in parts] == [14, 6]
    assert sorted(np.concatenate(parts).tolist()) == list(range(20))
    assert all(np.array_equal(part, np.sort(part)) for part in parts)
    assert [len(part) for part in dataset.split("100,0")] == [20, 0]


@given(st.integers(1, 1000), st.integers(1, 1000), st.integers(2, 500))
def test_the_nearest_number_of_documents_is_held_out(train: int, held_out: int, num_documents: int) -> None:
    number = held_out_documents(f"{train},{held_out}", num_documents)
    assert 1 <= number < num_documents
    if 1 < number < num_documents - 1:
        assert abs(number - held_out / (train + held_out) * num_documents) < 0.5 + 1e-9
    assert held_out_documents(f"{train},0", num_documents) == 0


@pytest.mark.parametrize("shares", ["", "a,b", "98,-2", "0,0", "nan,1", "inf,1", "70,20,10"])
def test_unusable_shares_are_named(shares: str) -> None:
    with pytest.raises(ValueError, match="--split"):
        held_out_documents(shares, 10)


def test_one_document_cannot_be_shared() -> None:
    assert held_out_documents("98,2", 2) == held_out_documents("1e20,1", 2) == 1
    with pytest.raises(ValueError, match="--split 98,2 holds documents out and the dataset has 1: give more, or"):
        held_out_documents("98,2", 1)


def test_a_vocabulary_that_is_not_recorded_has_all_of_the_tokens(tmp_path: Path) -> None:
    dataset = make(tmp_path / "pairs", [random_document(0)])
    assert dataset.manifest.tokenizer.get("vocab_size") is None
    assert dataset.vocab_size == max(int(tokens.max()) for tokens in dataset[0].all_tokens() if len(tokens)) + 1
