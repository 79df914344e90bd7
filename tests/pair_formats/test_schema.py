"""Schema 1: what is valid comes back as it was, what is not is named."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_longpo.pair_formats import schema
from megatron_longpo.pair_formats.document import Location, Message, PairsError, PreferenceDocument, Turn

HERE = Location("pairs.jsonl", 7)


def row(**changes: Any) -> dict[str, Any]:
    turn = {"chunk_span": [4, 8], "instruction": "What?", "chosen": "This.", "rejected": "That."}
    return {"schema": 1, "id": "one", "document": "The long document ✓", "turns": [turn], "provenance": {}} | changes


def with_turn(**changes: Any) -> dict[str, Any]:
    whole = row()
    whole["turns"] = [whole["turns"][0], {**whole["turns"][0], **changes}]
    return whole


def without(mapping: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in mapping.items() if name != key}


def test_a_row_becomes_a_document_and_a_row_again() -> None:
    document = schema.parse(row(provenance={"model": "m", "seed": 3}), HERE)
    assert document.turns == (Turn("What?", "This.", "That.", "long", (4, 8)),)
    assert document.location == HERE
    assert schema.dump(document) == row(provenance={"model": "m", "seed": 3})
    assert schema.parse(schema.dump(document), HERE) == document


def test_a_chunk_may_be_text() -> None:
    turn = without(row()["turns"][0], "chunk_span") | {"chunk": "not of the document"}
    document = schema.parse(row(turns=[turn]), HERE)
    assert document.turns[0].chunk == "not of the document" and document.turns[0].chunk_span is None
    assert schema.dump(document)["turns"] == [turn]
    both = with_turn(chunk="long")
    assert schema.parse(both, HERE).turns[1].chunk_span == (4, 8)


def test_spans_count_characters_not_bytes() -> None:
    document = schema.parse(row(document="ü✓x", turns=[row()["turns"][0] | {"chunk_span": [1, 3]}]), HERE)
    assert document.turns[0].chunk == "✓x"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row(schema=2), "field 'schema' is 2; this version reads schema 1"),
        (row(schema=True), "field 'schema' is True"),
        (row(schema="1"), "field 'schema' is '1'"),
        (without(row(), "id"), "field 'id' is missing"),
        (row(id=5), "field 'id' is a number, not a string"),
        (row(document=""), "field 'document' is empty"),
        (row(document=None), "field 'document' is null"),
        (row(document="broken \ud83d emoji"), "field 'document' has half of a surrogate pair at character 7"),
        (without(row(), "turns"), "field 'turns' is missing"),
        (row(turns=[]), "field 'turns' is empty"),
        (row(turns={}), "field 'turns' is an object"),
        (row(turns=["x"]), r"field 'turns\[0\]' is a string, not an object"),
        (row(provenance="me"), "field 'provenance' is a string"),
        (with_turn(provenance=[]), r"field 'turns\[1\]\.provenance' is a list"),
        (row(documnet="x"), "field 'documnet' is unknown; did you mean 'document'"),
        (with_turn(chosen=" \n"), r"field 'turns\[1\]\.chosen' is empty"),
        (with_turn(rejected=""), r"field 'turns\[1\]\.rejected' is empty"),
        (with_turn(instruction=["x"]), r"field 'turns\[1\]\.instruction' is a list"),
        (with_turn(rejected="This."), r"field 'turns\[1\]\.rejected' is identical to 'turns\[1\]\.chosen'"),
        (with_turn(rejected=" This.\n"), "identical"),
        (with_turn(chunk_span=[4, 20]), r"field 'turns\[1\]\.chunk_span' is \[4, 20\], outside of the document's 19"),
        (with_turn(chunk_span=[8, 4]), "0 <= start < end <= 19"),
        (with_turn(chunk_span=[-1, 4]), "outside"),
        (with_turn(chunk_span=[3, 3]), "outside"),
        (with_turn(chunk_span=[3, 4]), r"field 'turns\[1\]\.chunk_span' is empty"),
        (with_turn(chunk_span=[1.0, 4]), "two whole numbers"),
        (with_turn(chunk_span=[False, 4]), "two whole numbers"),
        (with_turn(chunk_span="4-8"), r"write \[start_char, end_char\]"),
        (with_turn(chunk_span=None), "two whole numbers"),
        (with_turn(instruction=None), r"field 'turns\[1\]\.instruction' is null"),
        (with_turn(instruction=""), r"field 'turns\[1\]\.instruction' is empty"),
        (row(turns=[without(row()["turns"][0], "instruction")]), "instruction' is missing"),
        (with_turn(chunk=None), r"field 'turns\[1\]\.chunk' is null"),
        (row(long_context="Be brief."), "field 'long_context' is a string, not a list"),
        (row(long_context=["Be brief."]), r"field 'long_context\[0\]' is a string, not an object"),
        (row(short_context=[{"role": "system"}]), r"field 'short_context\[0\]\.content' is missing"),
        (row(short_context=[{"role": "system", "content": "x", "name": "y"}]), r"short_context\[0\]\.name' is unknown"),
        (with_turn(chunk="other"), "is not the text at 'chunk_span'"),
        (with_turn(chunk_spam=[1, 2]), r"'turns\[1\]\.chunk_spam' is unknown; did you mean 'turns\[1\]\.chunk_span'"),
        (row(turns=[without(row()["turns"][0], "chunk_span")]), "'chunk_span' is missing|chunk_span' is missing"),
    ],
)
def test_what_breaks_the_schema_is_named(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(PairsError, match=rf"^pairs\.jsonl:7: .*{message}"):
        schema.parse(bad, HERE)


def test_what_other_formats_have_is_written_out() -> None:
    """Prompts that hold their instruction, no short prompt, messages before the prompts: nothing is lost."""
    turn = Turn("", "yes", "no", None)
    context = (Message("system", "x"), Message("user", "hi"), Message("assistant", "ho"))
    document = PreferenceDocument("id", "prompt", (turn,), long_context=context, short_context=context[:1])
    dumped = schema.dump(document)
    assert dumped["turns"][0]["instruction"] is None and dumped["turns"][0]["chunk"] is None
    assert dumped["short_context"] == [{"role": "system", "content": "x"}]
    assert schema.parse(dumped, HERE) == document
    assert not {"long_context", "short_context"} & set(schema.dump(schema.parse(row(), HERE)))
