"""Reading and writing pairs files, and a fuzz of broken ones: a row is read, or named in an error, and nothing else."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_longpo.pairs import PairsError, PreferenceDocument, TokenizedPair, Turn, read_pairs, write_pairs

SCHEMA_ROW = {
    "schema": 1,
    "id": "one",
    "document": "The long document",
    "turns": [{"chunk_span": [4, 8], "instruction": "What?", "chosen": "This.", "rejected": "That."}],
    "provenance": {"model": "m"},
}
TRL_ROW = {
    "prompt": [{"role": "user", "content": "Why?"}],
    "chosen": [{"role": "assistant", "content": "So."}],
    "rejected": [{"role": "assistant", "content": "No."}],
    "short_prompt": "Why?",
}
TOKEN_ROW = {
    "chosen_input_ids": [1, 2, 3],
    "chosen_labels": [-100, -100, 3],
    "rejected_input_ids": [1, 2, 4],
    "rejected_labels": [-100, -100, 4],
    "ref_chosen_input_ids": [[1, 3]],
    "ref_chosen_labels": [[-100, 3]],
    "ref_rejected_input_ids": [[1, 4]],
    "ref_rejected_labels": [[-100, 4]],
}


def write_rows(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_formats_are_told_apart_line_by_line(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "mixed.jsonl", SCHEMA_ROW, TRL_ROW, TOKEN_ROW)
    rows = list(read_pairs(path))
    assert [type(row) for row in rows] == [PreferenceDocument, PreferenceDocument, TokenizedPair]
    assert [row.id for row in rows] == ["one", "mixed.jsonl:2", "mixed.jsonl:3"]
    assert [str(row.location) for row in rows] == [f"{path}:{line}" for line in (1, 2, 3)]


def test_several_files_are_read_in_order(tmp_path: Path) -> None:
    first = write_rows(tmp_path / "first.jsonl", SCHEMA_ROW)
    second = write_rows(tmp_path / "second.jsonl", SCHEMA_ROW | {"id": "two"})
    assert [row.id for row in read_pairs([second, first])] == ["two", "one"]


def test_ids_must_be_unique_over_all_files(tmp_path: Path) -> None:
    first = write_rows(tmp_path / "first.jsonl", SCHEMA_ROW)
    second = write_rows(tmp_path / "second.jsonl", SCHEMA_ROW)
    with pytest.raises(PairsError, match=r"second\.jsonl:1: field 'id' is 'one', which .*first\.jsonl:1 already has"):
        list(read_pairs([first, second]))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"document": "x", "turns": []}, r"field 'schema' is missing; add \"schema\": 1"),
        ({"text": "x", "label": 1}, "is no preference pair, its fields are: 'text', 'label'"),
        ({}, "its fields are: none"),
        ({"chosen": "x"}, "is no preference pair"),
        ({"schema": 9, "chosen": "x"}, "field 'schema' is 9"),
    ],
)
def test_unknown_rows_are_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = write_rows(tmp_path / "pairs.jsonl", TRL_ROW, row)
    with pytest.raises(PairsError, match=rf"pairs\.jsonl:2: .*{message}"):
        list(read_pairs(path))


def test_a_file_of_blank_lines_has_no_pairs(tmp_path: Path) -> None:
    (tmp_path / "blank.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match=r"blank\.jsonl: there is not a single pair"):
        list(read_pairs(tmp_path / "blank.jsonl"))


def test_rows_are_read_one_at_a_time(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "pairs.jsonl", SCHEMA_ROW, {"broken": True})
    rows = read_pairs(path)
    assert next(rows).id == "one"
    with pytest.raises(PairsError, match=":2:"):
        next(rows)


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(lambda t: bool(t.strip()))


@st.composite
def preference_documents(draw: st.DrawFn) -> PreferenceDocument:
    document = draw(texts)
    turns = []
    for _ in range(draw(st.integers(1, 3))):
        chosen, rejected = draw(st.tuples(texts, texts).filter(lambda pair: pair[0].strip() != pair[1].strip()))
        spanned = draw(st.booleans())
        chunk, span = (document, (0, len(document))) if spanned else (draw(texts), None)
        turns.append(Turn(draw(texts), chosen, rejected, chunk, span, draw(st.just({}) | st.just({"score": 1}))))
    provenance = draw(st.dictionaries(texts, st.integers() | texts, max_size=2))
    return PreferenceDocument(draw(texts), document, tuple(turns), provenance)


@settings(max_examples=50)
@given(documents=st.lists(preference_documents(), min_size=1, max_size=3, unique_by=lambda document: document.id))
def test_documents_survive_a_file(
    tmp_path_factory: pytest.TempPathFactory, documents: list[PreferenceDocument]
) -> None:
    path = tmp_path_factory.mktemp("pairs") / "new" / "pairs.jsonl"
    assert write_pairs(path, documents) == len(documents)
    assert list(read_pairs(path)) == documents


def test_writing_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    good = PreferenceDocument("good", "document", (Turn("ask", "a", "b", "document", (0, 8)),))
    bad = PreferenceDocument("bad", "document", (Turn("ask", "same", "same", "document", (0, 8)),))
    with pytest.raises(PairsError, match=r"pairs\.jsonl:2: .*identical"):
        write_pairs(path, [good, bad])
    assert not list(tmp_path.iterdir())
    write_pairs(path, [good])
    before = path.read_bytes()
    with pytest.raises(PairsError):
        write_pairs(path, [bad])
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def spots(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to every place inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(spot for key, item in items for spot in spots(item, (*path, key)))]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_fuzz_of_valid_rows_with_a_broken_spot(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    row: Any = copy.deepcopy(data.draw(st.sampled_from([SCHEMA_ROW, TRL_ROW, TOKEN_ROW])))
    *parents, key = data.draw(st.sampled_from(spots(row)[1:]))
    target = row
    for parent in parents:
        target = target[parent]
    if data.draw(st.booleans()):
        del target[key]
    else:
        target[key] = data.draw(json_values)
    assert_read_or_named(tmp_path_factory.getbasetemp() / "fuzz.jsonl", json.dumps(row).encode())


@settings(max_examples=200)
@given(data=st.data())
def test_fuzz_of_damaged_bytes(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    content = bytearray(json.dumps(data.draw(st.sampled_from([SCHEMA_ROW, TRL_ROW, TOKEN_ROW]))).encode())
    start = data.draw(st.integers(0, len(content) - 1))
    content[start : start + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    assert_read_or_named(tmp_path_factory.getbasetemp() / "fuzz.jsonl", bytes(content))


def assert_read_or_named(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        rows = list(read_pairs(path))
    except ValueError as error:
        assert str(path) in str(error), error
    else:
        assert rows
