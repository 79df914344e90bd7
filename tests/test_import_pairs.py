"""Other formats to schema 1 and back: what is written gives the tokens that the rows gave, or the row is left out."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_longpo.data.tokenize import DocumentTokenizer, PromptTemplate
from megatron_longpo.data.tokenizer import ChatTokenizer, TokenizerSpec
from megatron_longpo.import_pairs.convert import ImportCounts, ImportOptions, import_pairs, summary_table
from megatron_longpo.import_pairs.split import chunk_span, split_prompts
from megatron_longpo.import_pairs.tokenized import REASONS
from megatron_longpo.pairs import Message, PreferenceDocument, Turn, read_pairs, write_pairs
from tests.data.conftest import (  # noqa: F401  (fixtures)
    CHATML_TEMPLATE,
    INST_TEMPLATE,
    huggingface_folder,
    huggingface_tokenizer,
    inst_template_file,
    sentencepiece_file,
    sentencepiece_tokenizer,
    text,
    tokenizer,
)
from tests.tokenized_rows import NO, text_document, token_row

SCRIPT = Path(__file__).parents[1] / "tools" / "import_pairs.py"


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def specs(sentencepiece_file: Path, huggingface_folder: Path) -> dict[str, TokenizerSpec]:  # noqa: F811
    return {
        str(sentencepiece_file): TokenizerSpec(str(sentencepiece_file), chat_template=INST_TEMPLATE),
        str(huggingface_folder): TokenizerSpec(str(huggingface_folder)),
    }


Importer = Callable[..., tuple[list[PreferenceDocument], ImportCounts]]


@pytest.fixture
def run(tmp_path: Path) -> Importer:
    def importer(rows: list[dict[str, Any]], spec: TokenizerSpec | None = None, **options: Any) -> Any:
        source, output = write_rows(tmp_path / "rows.jsonl", rows), str(tmp_path / "out" / "pairs.jsonl")
        counts = import_pairs(ImportOptions((source,), output, spec, **options), progress=False)
        return list(read_pairs(output)), counts

    return importer


def test_tokenized_rows_come_back_as_the_text_they_were_made_of(
    tokenizer: ChatTokenizer,  # noqa: F811
    specs: dict[str, TokenizerSpec],
    text: str,  # noqa: F811
    run: Importer,
) -> None:
    documents = [text_document(text, number, 1 + number % 4) for number in range(6)]
    tokenize = DocumentTokenizer(tokenizer)
    imported, counts = run([token_row(tokenize(d)) for d in documents], specs[tokenizer.path])
    for ours, theirs in zip(imported, documents, strict=True):
        origin = {"format": "tokenized", "file": "rows.jsonl", "line": ours.location.line, "prompt": "split"}
        assert ours.provenance == {"imported_from": origin}
        assert replace(ours, provenance={}) == theirs
        assert tokenize(ours) == tokenize(theirs)
    assert (counts.turns, counts.spans, counts.dropped.total()) == (13, 13, 0)
    assert counts.prompts == {"split": 6}


def test_a_tokenizer_that_puts_a_blank_before_every_piece(tmp_path: Path, text: str, run: Importer) -> None:  # noqa: F811
    """Llama 2's and Mistral's fast tokenizers: decoding a whole row leaves blanks that encoding would double."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    alphabet = sorted(set(text + "▁✓"))
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(text[:30_000].split(), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    fast.chat_template = INST_TEMPLATE
    fast.save_pretrained(tmp_path / "blanks")
    spec = TokenizerSpec(str(tmp_path / "blanks"))
    tokenizer = spec.load()  # noqa: F811
    whole = text_document(text, 1, 3)
    tokenized = DocumentTokenizer(tokenizer)(whole)
    assert (
        tokenizer.encode(tokenizer.decode(tokenized.document_tokens))[0].tolist() != tokenized.document_tokens.tolist()
    )
    (imported,), _ = run([token_row(tokenized)], spec)
    assert replace(imported, provenance={}) == whole


def test_an_instruction_that_may_begin_earlier_is_reported(
    huggingface_tokenizer: ChatTokenizer,  # noqa: F811
    specs: dict[str, TokenizerSpec],
    text: str,  # noqa: F811
    run: Importer,
) -> None:
    whole = text_document(text, 3, 1)
    end = len(whole.document)
    assert "\n\n" in whole.document[end - 1000 :]
    (turn,) = whole.turns
    turn = replace(turn, instruction="What?", chunk=whole.document[end - 1000 :], chunk_span=(end - 1000, end))
    whole = replace(whole, turns=(turn,))
    (imported,), counts = run(
        [token_row(DocumentTokenizer(huggingface_tokenizer)(whole))], specs[huggingface_tokenizer.path]
    )
    assert imported.turns == whole.turns and imported.provenance["imported_from"]["prompt"] == "split_unsure"
    assert counts.prompts == {"split_unsure": 1}
    assert "shortest instruction taken" in summary_table(counts)


def test_without_short_prompts_the_first_instruction_stays_in_the_document(
    huggingface_tokenizer: ChatTokenizer,  # noqa: F811
    specs: dict[str, TokenizerSpec],
    text: str,  # noqa: F811
    run: Importer,
) -> None:
    whole = text_document(text, 1, 2)
    row = token_row(DocumentTokenizer(huggingface_tokenizer)(whole))
    row = {key: value for key, value in row.items() if not key.startswith("ref_")}
    (imported,), counts = run([row], specs[huggingface_tokenizer.path])
    assert imported.document == PromptTemplate().fill(whole.document, whole.turns[0].instruction)
    assert [turn.instruction for turn in imported.turns] == ["", whole.turns[1].instruction]
    assert [turn.chunk for turn in imported.turns] == [None, None]
    assert counts.prompts == {"whole": 1}


def break_row(row: dict[str, Any], how: str, tokenizer: ChatTokenizer) -> dict[str, Any]:  # noqa: F811
    """A valid row of the layout that this tokenizer and template did not make."""

    def edit(old: str, new: str, *keys: str, letters: tuple[str, ...] = ()) -> dict[str, Any]:
        """Replace text in some sequences, prompts and answers alike; the labels follow."""
        changed = {}
        for key in keys:
            nested = isinstance(row[f"{key}_input_ids"][0], list)
            ids = row[f"{key}_input_ids"][0] if nested else row[f"{key}_input_ids"]
            labels = row[f"{key}_labels"][0] if nested else row[f"{key}_labels"]
            old_ids = tokenizer.encode(old)[0].tolist()
            at = next(i for i in range(len(ids)) if ids[i : i + len(old_ids)] == old_ids)
            new_ids = [token for piece in (new, *letters) for token in tokenizer.encode(piece)[0].tolist()]
            is_response = labels[at] != NO
            ids = ids[:at] + new_ids + ids[at + len(old_ids) :]
            labels = labels[:at] + (new_ids if is_response else [NO] * len(new_ids)) + labels[at + len(old_ids) :]
            wrap = (lambda value: [value]) if nested else (lambda value: value)
            changed |= {f"{key}_input_ids": wrap(ids), f"{key}_labels": wrap(labels)}
        return {key: value for key, value in row.items() if "mask" not in key} | changed

    if how == "unknown_tokens":
        return row | {"chosen_input_ids": [tokenizer.vocab_size, *row["chosen_input_ids"][1:]]}
    if how == "other_tokens":  # two letters where the tokenizer makes one token
        return edit(" the", "", "chosen", letters=(" ", "t", "h", "e"))
    if how == "other_markers":
        return edit("<|im_start|>user\n", "<|im_start|>human\n", "chosen", "rejected", "ref_chosen", "ref_rejected")
    if how == "other_instructions":
        return edit(" say", " mean", "rejected")
    if how == "other_chunks":
        return edit(" say", " mean", "chosen", "rejected")
    assert how == "other_responses"  # the line break behind the answer is the template's, and not marked
    labels = list(row["rejected_labels"])
    return row | {"rejected_labels": [*labels[:-1], NO]}


@pytest.mark.parametrize(
    "reason",
    ["unknown_tokens", "other_tokens", "other_markers", "other_instructions", "other_chunks", "other_responses"],
)
def test_rows_that_cannot_be_had_exactly_are_left_out_and_counted(
    reason: str,
    huggingface_tokenizer: ChatTokenizer,  # noqa: F811
    specs: dict[str, TokenizerSpec],
    text: str,  # noqa: F811
    run: Importer,
) -> None:
    tokenize = DocumentTokenizer(huggingface_tokenizer)
    good = token_row(tokenize(text_document(text, 1, 1)))
    bad = break_row(token_row(tokenize(text_document(text, 2, 1))), reason, huggingface_tokenizer)
    imported, counts = run([bad, good], specs[huggingface_tokenizer.path])
    assert [d.id for d in imported] == ["document 1"]
    assert counts.dropped == {reason: 1}
    assert "rows.jsonl:1" in summary_table(counts)
    with pytest.raises(ValueError, match=r"none of 1 rows could be converted.*rows\.jsonl:1"):
        run([bad], specs[huggingface_tokenizer.path])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("message.content | trim", "other_tokens"),
        ("raise_exception('no lines') if '\\n' in message.content else message.content", "refused_by_template"),
    ],
)
def test_text_that_the_template_would_not_write_again_is_left_out(
    content: str,
    reason: str,
    sentencepiece_tokenizer: ChatTokenizer,  # noqa: F811
    sentencepiece_file: Path,  # noqa: F811
    text: str,  # noqa: F811
    run: Importer,
) -> None:
    """Markers and texts are found, and yet this template makes other tokens of them than the row's."""
    template = INST_TEMPLATE.replace("message.content", content)
    (turn,) = text_document(text, 1, 1).turns
    document = replace(text_document(text, 1, 1), turns=(replace(turn, rejected="Not \n0. "),))
    row = token_row(DocumentTokenizer(sentencepiece_tokenizer)(document))
    with pytest.raises(ValueError, match=re.escape(REASONS[reason])):
        run([row], TokenizerSpec(str(sentencepiece_file), chat_template=template))


def test_tokenized_rows_of_another_tokenizer_are_not_guessed(
    sentencepiece_tokenizer: ChatTokenizer,  # noqa: F811
    specs: dict[str, TokenizerSpec],
    huggingface_folder: Path,  # noqa: F811
    text: str,  # noqa: F811
    run: Importer,
) -> None:
    rows = [token_row(DocumentTokenizer(sentencepiece_tokenizer)(text_document(text, n, 2))) for n in range(2)]
    with pytest.raises(ValueError, match="none of 2 rows could be converted"):
        run(rows, specs[str(huggingface_folder)])
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: the row holds tokens.*--tokenizer-model"):
        run(rows)


def test_trl_rows_keep_their_tokens(
    huggingface_tokenizer: ChatTokenizer,  # noqa: F811
    run: Importer,
) -> None:
    system = {"role": "system", "content": "Be brief."}
    long, short = "One.\n\nTwo <b>.\n\nThree.", "Two <b>."
    rows: list[dict[str, Any]] = [
        {"prompt": f"{long}\n\nWhy?", "short_prompt": f"{short}\n\nWhy?", "chosen": "So.", "rejected": "No."},
        {"prompt": f"{long}\n\nWhy?", "short_prompt": "Something else. Why?", "chosen": "So.", "rejected": "No."},
        {
            "prompt": [system, {"role": "user", "content": long}],
            "chosen": [{"role": "assistant", "content": "So."}],
            "rejected": [{"role": "assistant", "content": "No."}],
        },
    ]
    imported, counts = run(rows)
    first, second, third = imported
    assert (first.document, first.turns[0].instruction, first.turns[0].chunk_span) == (long, "Why?", (6, 14))
    assert (second.document, second.turns[0].instruction) == (f"{long}\n\nWhy?", "")
    assert third.long_context == (Message("system", "Be brief."),) and third.turns[0].chunk is None
    assert counts.prompts == {"split": 1, "whole": 2}
    tokenize = DocumentTokenizer(huggingface_tokenizer)
    for row, ours in zip(rows, imported, strict=True):
        assert ours.provenance["imported_from"]["format"] == "trl"
        (theirs,) = read_back(row)
        assert tokenize(replace(ours, id="")) == tokenize(replace(theirs, id=""))


def read_back(row: dict[str, Any]) -> list[Any]:
    from megatron_longpo.pair_formats import trl
    from megatron_longpo.pairs import Location

    return [trl.parse(row, Location("x", 1))]


def test_schema_1_passes_unchanged(tmp_path: Path, text: str) -> None:  # noqa: F811
    source = tmp_path / "pairs.jsonl"
    whole = PreferenceDocument("whole", "A.\n\nWhy?", (Turn("", "a", "b", "A.\n\nWhy?"),), {"x": [1]})
    write_pairs(source, [text_document(text, 0, 2), whole])
    output = tmp_path / "out.jsonl"
    counts = import_pairs(ImportOptions((str(source),), str(output)), progress=False)
    assert output.read_bytes() == source.read_bytes()
    assert counts.read == {"schema 1": 2} and not counts.prompts


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


def test_the_command(tmp_path: Path) -> None:
    row = {"prompt": "Long.\n\nWhy?", "short_prompt": "Long.\n\nWhy?", "chosen": "So.", "rejected": "No."}
    source, output = write_rows(tmp_path / "rows.jsonl", [row]), tmp_path / "pairs.jsonl"
    command = [sys.executable, str(SCRIPT), "--input", source, "--output"]
    done = subprocess.run([*command, str(output)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.split()[-1] for line in done.stdout.splitlines() if line.startswith("documents written")] == ["1"]
    assert len(list(read_pairs(output))) == 1
    failed = subprocess.run([*command, source], capture_output=True, text=True)
    assert failed.returncode == 1 and "is one of the files of --input" in failed.stderr
    assert len(failed.stderr.strip().splitlines()) == 1


def test_a_bad_row_leaves_nothing(tmp_path: Path, run: Importer) -> None:
    good = {"prompt": "Long. Why?", "chosen": "So.", "rejected": "No."}
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: field 'rejected' is identical"):
        run([good, good | {"rejected": "So."}])
    assert not list((tmp_path / "out").iterdir())
    rows = str(tmp_path / "rows.jsonl")
    for output, message in (("out", r"--output .* is a folder"), ("rows.jsonl/x", r"--output .* cannot be written")):
        with pytest.raises(ValueError, match=message):
            import_pairs(ImportOptions((rows,), str(tmp_path / output)), progress=False)


def test_only_the_proof_finds_a_template_that_trims(
    huggingface_tokenizer: ChatTokenizer,  # noqa: F811
    huggingface_folder: Path,  # noqa: F811
    text: str,  # noqa: F811
    run: Importer,
) -> None:
    """All markers are in place, and yet another text would be trained on."""
    whole = text_document(text, 1, 1)
    blank = replace(whole, id="blank", turns=(replace(whole.turns[0], instruction="What is it?  "),))
    rows = [token_row(DocumentTokenizer(huggingface_tokenizer)(d)) for d in (whole, blank)]
    trimming = CHATML_TEMPLATE.replace("message.content", "message.content | trim")
    imported, counts = run(rows, TokenizerSpec(str(huggingface_folder), chat_template=trimming))
    assert [d.id for d in imported] == ["document 1"] and counts.dropped == {"other_tokens": 1}
