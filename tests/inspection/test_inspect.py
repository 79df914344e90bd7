"""One pass over pairs: the sample, the numbers, the sources, in bounded memory."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from megatron_longpo.data.tokenizer import TokenizerSpec
from megatron_longpo.inspection.inspect import Inspection, InspectOptions, inspect
from megatron_longpo.pairs import PreferenceDocument, Turn, read_pairs, write_pairs
from tests.inspection.conftest import REPORT


def look(*paths: Path, **options: object) -> Inspection:
    return inspect(InspectOptions(tuple(map(str, paths)), **options), progress=False)  # type: ignore[arg-type]


def shown(inspection: Inspection) -> set[tuple[str, int]]:
    return {(view.id, view.turn) for view in inspection.views}


def test_the_numbers_are_those_of_the_rows(generated: Path) -> None:
    inspection = look(generated)
    documents = [row for row in read_pairs(generated / "pairs.jsonl") if isinstance(row, PreferenceDocument)]
    turns = [turn for document in documents for turn in document.turns]
    statistics = inspection.statistics
    assert statistics is not None
    assert (statistics.num_documents, statistics.num_pairs) == (12, 30) == (len(documents), len(turns))
    assert statistics.formats == {"schema 1": 12}
    lengths = {(what, unit): numbers for what, unit, numbers in statistics.sorted_lengths()}
    assert lengths["documents", "characters"].values().tolist() == [len(d.document) for d in documents]
    assert lengths["chosen", "characters"].values().tolist() == [len(turn.chosen) for turn in turns]
    assert lengths["instructions", "words"].quantiles()[0] == min(
        len(turn.instruction.replace(".", " ").replace("?", " ").split()) for turn in turns
    )
    assert ("documents", "tokens") not in lengths
    assert statistics.num_chosen_longer == sum(len(turn.chosen) > len(turn.rejected) for turn in turns)
    assert statistics.turns.values().tolist() == [len(d.turns) for d in documents]


def test_coverage_counts_how_many_chunks_cover_each_part(tmp_path: Path) -> None:
    document = "x" * 2000
    spans = [(0, 1000), (1000, 2000), (950, 1050)]
    turns = tuple(Turn("ask", "a", "b", document[slice(*span)], span) for span in spans)
    write_pairs(tmp_path / "pairs.jsonl", [PreferenceDocument("one", document, turns)])
    statistics = look(tmp_path).statistics
    assert statistics is not None
    expected = np.full(20, 1 / 3)
    expected[[9, 10]] = (1 + 0.5) / 3
    assert statistics.coverage() == pytest.approx(expected)


def test_tokens_are_counted_with_a_tokenizer(generated: Path, spec: TokenizerSpec) -> None:
    inspection = look(generated, tokenizer=spec)
    tokenizer = spec.load()
    documents = [row for row in read_pairs(generated / "pairs.jsonl") if isinstance(row, PreferenceDocument)]
    assert inspection.statistics is not None
    counted = inspection.statistics.lengths["documents", "tokens"].values().tolist()
    assert counted == [len(tokenizer.encode(document.document)[0]) for document in documents]
    assert all(view.chosen.length.tokens for view in inspection.views)


def test_the_sample_depends_on_seed_and_ids_alone(generated: Path, tmp_path: Path) -> None:
    first = look(generated, num_pairs=6)
    assert len(shown(first)) == 6
    lines = (generated / "pairs.jsonl").read_text().splitlines(keepends=True)
    backwards = tmp_path / "backwards.jsonl"
    backwards.write_text("".join(reversed(lines)))
    assert shown(look(backwards, num_pairs=6)) == shown(first)
    assert shown(look(generated, num_pairs=5)) < shown(first), "a smaller sample is part of a larger one"
    assert shown(look(generated, num_pairs=6, seed=1)) != shown(first)
    assert len(look(generated, num_pairs=1000).views) == 30
    assert look(generated, num_pairs=0).views == ()


def test_every_pair_is_as_likely_as_any_other(generated: Path) -> None:
    drawn = [place for seed in range(60) for place in shown(look(generated, num_pairs=10, seed=seed))]
    counts = np.unique([f"{name} {turn}" for name, turn in drawn], return_counts=True)[1]
    assert len(counts) == 30 and counts.min() >= 6 and counts.max() <= 36  # 20 expected, standard deviation 3.7


def test_one_document_is_shown_whole_and_a_wrong_id_gets_a_hint(generated: Path) -> None:
    inspection = look(generated, document_id="document 3", needs_report=False)
    assert [(view.id, view.turn) for view in inspection.views] == [("document 3", turn) for turn in (1, 2, 3, 4)]
    assert inspection.statistics is None, "it reads no further than the document"
    assert look(generated, document_id="document 3").statistics is not None
    with pytest.raises(ValueError, match=r"--id dokument 3: none of 12 documents .* did you mean 'document 3'"):
        look(generated, document_id="dokument 3")
    with pytest.raises(ValueError, match="ids look like 'document 0'"):
        look(generated, document_id="~")


def test_one_document_is_found_without_reading_on(generated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_longpo.inspection.inspect.count_rows", lambda files: pytest.fail("all was read"))
    with open(generated / "pairs.jsonl", "a") as file:
        file.write("no JSON\n")
    wanted = InspectOptions((str(generated),), document_id="document 3", needs_report=False)
    assert {view.id for view in inspect(wanted).views} == {"document 3"}


def test_reports_of_generation_lie_beside_their_pairs(generated: Path, tmp_path: Path) -> None:
    for path in (generated, generated / "pairs.jsonl"):
        report = look(path).generation
        assert report is not None and report.documents_dropped == REPORT["documents"]["dropped"]
    (tmp_path / "other").mkdir()
    lines = (generated / "pairs.jsonl").read_text().replace('"id": "document', '"id": "other')
    (tmp_path / "other" / "pairs.jsonl").write_text(lines)
    (tmp_path / "other" / "report.json").write_text(json.dumps(REPORT))
    both = look(generated, tmp_path / "other").generation
    assert both is not None and both.turns_dropped == {"identical_answers": 20} and both.seconds == 8000
    twice = look(generated, generated / "pairs.jsonl")
    assert twice.statistics is not None and twice.statistics.num_documents == 12, "a file is read once"
    assert twice.generation is not None and twice.generation.documents_read == REPORT["documents"]["read"]
    alone = tmp_path / "alone.jsonl"
    alone.write_text(lines)
    assert look(alone).generation is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json", r"report\.json: is not what tools/generate_pairs\.py writes"),
        ('{"schema": 2}', "it has no 'schema': 1"),
        ('{"schema": 1}', "'documents' is missing"),
        (json.dumps(REPORT | {"turns": {"planned": "many", "kept": 1, "dropped": {}}}), "invalid literal"),
        (json.dumps(REPORT | {"turns": []}), "list indices"),
    ],
)
def test_a_broken_report_is_named(generated: Path, content: str, message: str) -> None:
    (generated / "report.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        look(generated)


def test_a_generation_without_pairs_yet_is_named(generated: Path) -> None:
    (generated / "pairs.jsonl").unlink()
    with pytest.raises(ValueError, match=r"has report\.json and no pairs\.jsonl: run tools/generate_pairs\.py again"):
        look(generated)


def test_prompts_of_trl_rows_are_taken_apart(tmp_path: Path) -> None:
    rows = [
        {"prompt": "One. Two.\n\nWhy?", "short_prompt": "Two.\n\nWhy?", "chosen": "So.", "rejected": "No."},
        {
            "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Long text. Why?"}],
            "chosen": [{"role": "assistant", "content": "So."}],
            "rejected": [{"role": "assistant", "content": "No."}],
        },
    ]
    path = tmp_path / "trl.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    inspection = look(path)
    first, second = inspection.views
    assert (first.instruction.text, first.chunk_share) == ("Why?", (5 / 9, 1.0)) and first.has_instruction
    assert second.chunk is None and not second.has_instruction and second.instruction.text == "Long text. Why?"
    assert second.context[0].content == "Be brief." and second.whole_prompts
    assert inspection.statistics is not None
    assert (inspection.statistics.num_with_chunk, inspection.statistics.num_with_span) == (1, 1)


def test_tokenized_rows_without_a_tokenizer_have_lengths_only(tokenized: Path) -> None:
    inspection = look(tokenized)
    assert inspection.statistics is not None and inspection.statistics.num_pairs == 5
    assert {unit for _, unit, _ in inspection.statistics.sorted_lengths()} == {"tokens"}
    for view in inspection.views:
        assert view.chosen.text is None and view.chosen.length.tokens and "--tokenizer-model" in view.note
        assert 0 <= view.similarity < 1 and view.chunk is not None


def test_tokenized_rows_are_text_with_a_tokenizer(tokenized: Path, text: str, spec: TokenizerSpec) -> None:
    views = look(tokenized, tokenizer=spec).views
    assert len(views) == 5
    for view in views:
        number, turn = int(view.id.split()[1]), view.turn - 1
        assert view.chosen.text == f"It is {turn} ✓, of {number}." and view.has_instruction and view.chunk_share
    row = json.loads(tokenized.read_text().splitlines()[0])
    for key in row:
        if key.endswith("labels") and not key.startswith("ref"):
            row[key][-1] = -100  # the template's end token is no response here: not exact, but it can be read
    tokenized.write_text(json.dumps(row) + "\n")
    for view in look(tokenized, tokenizer=spec).views:
        assert view.note.startswith("Decoded as it is") and "✓" in str(view.chosen.text)
        assert view.chunk is not None and text[9_600:9_700] in str(view.chunk.text)
        assert "part" in str(view.instruction.text)


def test_memory_does_not_grow_with_the_documents(tmp_path: Path) -> None:
    num_chars = 200_000
    turn = Turn("ask", "yes", "no", "chunk", None)
    path = tmp_path / "pairs.jsonl"
    write_pairs(path, (PreferenceDocument(f"d{i}", "x" * num_chars, (turn,)) for i in range(60)))
    look(path)
    tracemalloc.start()
    look(path)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 10 * num_chars
