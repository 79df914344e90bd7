"""Documents in every form they come in, and what is wrong with those that are not."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import pytest

from megatron_longpo.data.chat_tokenizer import ChatTokenizer
from megatron_longpo.generation.corpus import CorpusDocument, count_documents, make_planner, plan_document, read_corpus
from tests.generation.conftest import Settings

ROWS = [{"id": "a", "text": "first"}, {"id": "b", "text": "second"}]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(settings: Settings, *documents: Path | str, **changes: object) -> list[tuple[str, str]]:
    chosen = settings(documents=tuple(map(str, documents)), **changes)
    found = list(read_corpus(chosen))
    assert [document.index for document in found] == list(range(len(found)))
    count = count_documents(chosen)
    assert count is None or count == len(found)
    return [(document.id, document.text) for document in found]


def test_json_lines_tables_and_datasets_folders(settings: Settings, tmp_path: Path) -> None:
    expected = [("a", "first"), ("b", "second")]
    plain = write_jsonl(tmp_path / "plain.jsonl", ROWS)
    assert read(settings, plain) == expected
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read(settings, packed) == expected
    table = datasets.Dataset.from_list(ROWS)
    table.to_parquet(tmp_path / "table.parquet")
    assert read(settings, tmp_path / "table.parquet") == expected
    table.save_to_disk(tmp_path / "folder")
    assert read(settings, tmp_path / "folder") == expected


def test_json_files_hold_a_list_or_a_document_a_line(settings: Settings, tmp_path: Path) -> None:
    expected = [("a", "first"), ("b", "second")]
    lines = write_jsonl(tmp_path / "lines.json", ROWS)
    assert read(settings, lines) == expected
    (tmp_path / "list.json").write_text("\ufeff" + json.dumps(ROWS, indent=1))
    assert read(settings, tmp_path / "list.json") == expected
    (tmp_path / "list.json.gz").write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    assert read(settings, tmp_path / "*.json.gz") == expected
    (tmp_path / "object.json").write_text(json.dumps(ROWS[0], indent=1))
    with pytest.raises(
        ValueError, match=r"object.json:1: is not JSON \(.*\); write one JSON object per line, or one list"
    ):
        read(settings, tmp_path / "object.json")
    (tmp_path / "texts.json").write_text('[{"text": "x"}, "y"]')
    with pytest.raises(ValueError, match=r"texts.json:2: is a string, not an object; write one JSON object per line"):
        read(settings, tmp_path / "texts.json")
    (tmp_path / "about").mkdir()
    lines.rename(tmp_path / "about" / "dataset_info.json")
    with pytest.raises(ValueError, match=r"about: the folder holds no document"):
        read(settings, tmp_path / "about")


def test_text_files_are_documents_of_their_own(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.md", "a.txt", "deep/c.py", "ignored.png"):
        (tmp_path / name).write_text(name)
    names = [str(tmp_path / name) for name in ("a.txt", "b.md", "deep/c.py")]
    assert read(settings, tmp_path) == [(name, Path(name).relative_to(tmp_path).as_posix()) for name in names]
    assert read(settings, tmp_path / "ignored.png") == [(str(tmp_path / "ignored.png"), "ignored.png")]


def test_patterns_are_expanded_in_order_and_files_taken_once(settings: Settings, tmp_path: Path) -> None:
    for name in ("2.jsonl", "1.jsonl"):
        write_jsonl(tmp_path / name, [{"id": name, "text": name}])
    found = [id for id, _ in read(settings, tmp_path / "*.jsonl", tmp_path / "2.jsonl")]
    assert found == ["1.jsonl", "2.jsonl"]
    odd = write_jsonl(tmp_path / "[odd].jsonl", ROWS)
    assert len(read(settings, odd)) == 2


def test_other_fields_and_missing_ids(settings: Settings, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"body": "first", "key": 7}, {"body": "second", "key": " "}])
    assert read(settings, path, text_field="body", id_field="key") == [("7", "first"), ("rows.jsonl:2", "second")]
    assert read(settings, path, text_field="body", max_documents=1) == [("rows.jsonl:1", "first")]
    (tmp_path / "more").mkdir()
    again = write_jsonl(tmp_path / "more" / "rows.jsonl", [{"body": "third"}])
    ids = [document.id for document in read_corpus(settings(documents=(str(path), str(again)), text_field="body"))]
    assert ids == [f"{path}:1", f"{path}:2", f"{again}:1"], "names that two files share would give the same id"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"there is not a single document in it"),
        (b'{"id": "a"}\n', r"bad.jsonl:1: there is no field 'text', the fields are: 'id'; .* --text-field"),
        (b'{"text": "fine"}\n{"text": 3}\n', r"bad.jsonl:2: field 'text' is a number, not a string: leave"),
        (
            b'{"id": [1], "text": "x"}\n',
            r"bad.jsonl:1: field 'id' is a list, not an id; name another one with --id-field",
        ),
        (b'{"id": "\\ud800", "text": "x"}\n', r"bad.jsonl:1: the id '.ud800' is no valid Unicode: give another id"),
        (b'{"text": "cut', r"bad.jsonl:1: is not JSON"),
        (b'{"text": "\xff"}\n', r"bad.jsonl:1: is not UTF-8 at byte 10"),
        (
            b'{"id": "a", "text": "x"}\n{"id": "a", "text": "y"}\n',
            r"bad.jsonl:2: the id 'a' occurs a second time; .* --id-",
        ),
    ],
)
def test_bad_files(content: bytes, message: str, settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_corpus(settings(documents=(str(path),))))


def test_bad_paths(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"--documents .*none.jsonl: there is no such file or folder, and no file match"
    ):
        list(read_corpus(settings(documents=(str(tmp_path / "none.jsonl"),))))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"--documents .*empty: the folder holds no document; it may hold \.jsonl"):
        list(read_corpus(settings(documents=(str(tmp_path / "empty"),))))
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"words " * 9)[:-5])
    with pytest.raises(ValueError, match=r"cut.txt.gz: is not a whole gzip file"):
        list(read_corpus(settings(documents=(str(tmp_path / "cut.txt.gz"),))))
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.txt: is not UTF-8 at byte 3"):
        list(read_corpus(settings(documents=(str(tmp_path / "latin.txt"),))))


def test_documents_outside_of_the_lengths_are_dropped(settings: Settings, huggingface_tokenizer: ChatTokenizer) -> None:
    def reason(text: str, **changes: int) -> str:
        return plan_document(CorpusDocument(0, "d", text), huggingface_tokenizer, settings(**changes)).dropped

    words = " ".join(f"word{i}" for i in range(400))
    num_tokens = len(huggingface_tokenizer.encode(words)[0])
    limits = {"min_chunk_tokens": 50, "max_chunk_tokens": 90}
    assert reason(words, min_document_tokens=num_tokens, target_length=num_tokens, **limits) == ""
    assert reason(words, min_document_tokens=num_tokens + 1, target_length=10**6, **limits) == "document_too_short"
    assert reason(words, min_document_tokens=1, target_length=num_tokens - 1, **limits) == "document_too_long"
    assert reason(" \n\t ") == "no_text"
    assert reason("half a pair \ud800 " * 400) == "no_text"
    assert reason("few words", min_document_tokens=1, **limits) == "no_chunk"


def test_chunks_measure_in_the_models_tokens(
    settings: Settings, corpus: Path, huggingface_tokenizer: ChatTokenizer
) -> None:
    chosen = settings(documents=(str(corpus),))
    for document in read_corpus(chosen):
        plan = plan_document(document, huggingface_tokenizer, chosen)
        for chunk in plan.chunks:
            assert chosen.min_chunk_tokens <= chunk.num_tokens <= chosen.max_chunk_tokens
            alone = len(huggingface_tokenizer.encode(document.text[slice(*chunk.span)])[0])
            assert abs(alone - chunk.num_tokens) <= 12  # blanks trimmed, tokens at the edges


def test_for_a_server_the_tokenizer_counts_and_needs_no_template(settings: Settings, sentencepiece_file: Path) -> None:
    plan = make_planner(settings(tokenizer_model=str(sentencepiece_file)))(CorpusDocument(0, "d", "many words " * 500))
    assert plan.num_tokens > 300 and not plan.dropped
