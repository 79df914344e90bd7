"""Where a document ends, its instruction begins, and a chunk lies."""

from __future__ import annotations

import pytest

from megatron_longpo.data.tokenize import PromptTemplate
from megatron_longpo.import_pairs.split import chunk_span, split_prompts, splits


@pytest.mark.parametrize(
    ("long", "short", "expected"),
    [
        ("a b\n\nc\n\nI", "b\n\nI", ("a b\n\nc", "b", "I", True)),
        ("a b\n\nc\n\nI\n\nJ", "b\n\nI\n\nJ", ("a b\n\nc", "b", "I\n\nJ", True)),
        ("a\n\nb\n\nI", "a\n\nb\n\nI", ("a\n\nb", "a\n\nb", "I", False)),
        ("a\n\nI", "b\n\nI", None),
        ("a\n\nI", "a\n\nJ", None),
        ("a\nI", "a\nI", None),
        ("a\n\n\n\nI", "a\n\n\n\nI", ("a\n\n", "a\n\n", "I", False)),
    ],
)
def test_where_an_instruction_begins(long: str, short: str, expected: tuple[str, str, str, bool] | None) -> None:
    split = split_prompts(PromptTemplate(), long, short)
    assert (split and (split.document, split.chunk, split.instruction, split.is_only_one)) == expected


def test_instructions_before_the_document_and_other_separators() -> None:
    template = PromptTemplate("<{instruction}> # {document}!")
    split = split_prompts(template, "<I # J> # a # b # c!", "<I # J> # b!")
    assert split and (split.document, split.chunk, split.instruction) == ("a # b # c", "b", "I # J")
    assert split_prompts(template, "I # J", "I # J") is None


def test_a_chunk_has_a_place_only_if_it_has_one() -> None:
    assert chunk_span("abcabd", "abd") == (3, 6)
    assert chunk_span("abcabd", "ab") is None and chunk_span("aaa", "aa") is None and chunk_span("abc", "x") is None


@pytest.mark.parametrize("template", ["{document}{instruction}", "{instruction}{document}"])
def test_messages_without_a_separator_have_every_place(template: str) -> None:
    found = list(splits(PromptTemplate(template), "abcd", 2))
    assert sorted(found) == (
        [("ab", "cd"), ("abc", "d")] if template.startswith("{d") else [("bcd", "a"), ("cd", "ab")]
    )
