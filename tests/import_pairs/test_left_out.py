"""Tokenized rows whose text would not give the same tokens again are left out, each with its reason."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_longpo.data.chat_tokenizer import ChatTokenizer
from megatron_longpo.data.tokenize import DocumentTokenizer
from megatron_longpo.data.tokenizer import TokenizerSpec
from megatron_longpo.import_pairs.convert import summary_table
from megatron_longpo.import_pairs.tokenized import REASONS
from tests.data.conftest import CHATML_TEMPLATE, INST_TEMPLATE
from tests.import_pairs.conftest import Importer
from tests.tokenized_rows import NO, text_document, token_row


def break_row(row: dict[str, Any], how: str, tokenizer: ChatTokenizer) -> dict[str, Any]:
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
    huggingface_tokenizer: ChatTokenizer,
    specs: dict[str, TokenizerSpec],
    text: str,
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
    ("turn", "change", "taken", "reason"),
    [
        (0, {"instruction": "And now?"}, "ref_rejected", "other_instructions"),
        (1, {"instruction": "And now?"}, "ref", "other_instructions"),
        (1, {"chosen": "It is something else."}, "ref", "other_responses"),
        (1, {"rejected": "It is 1 ✓, of 2.\n"}, "", "empty_text"),
    ],
)
def test_rows_that_are_of_two_documents_are_left_out(
    turn: int,
    change: dict[str, str],
    taken: str,
    reason: str,
    huggingface_tokenizer: ChatTokenizer,
    specs: dict[str, TokenizerSpec],
    text: str,
    run: Importer,
) -> None:
    """The short prompts of another one, with other instructions or answers; answers that differ in blanks alone."""
    tokenize, document = DocumentTokenizer(huggingface_tokenizer), text_document(text, 2, 2)
    turns = list(document.turns)
    turns[turn] = replace(turns[turn], **change)
    other = token_row(tokenize(replace(document, turns=tuple(turns))))
    bad = token_row(tokenize(document)) | {key: value for key, value in other.items() if key.startswith(taken)}
    with pytest.raises(ValueError, match=re.escape(REASONS[reason])):
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
    sentencepiece_tokenizer: ChatTokenizer,
    sentencepiece_file: Path,
    text: str,
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
    sentencepiece_tokenizer: ChatTokenizer,
    specs: dict[str, TokenizerSpec],
    huggingface_folder: Path,
    text: str,
    run: Importer,
) -> None:
    rows = [token_row(DocumentTokenizer(sentencepiece_tokenizer)(text_document(text, n, 2))) for n in range(2)]
    with pytest.raises(ValueError, match="none of 2 rows could be converted"):
        run(rows, specs[str(huggingface_folder)])
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: the row holds tokens.*--tokenizer-model"):
        run(rows)


def test_only_the_proof_finds_a_template_that_trims(
    huggingface_tokenizer: ChatTokenizer,
    huggingface_folder: Path,
    text: str,
    run: Importer,
) -> None:
    """All markers are in place, and yet another text would be trained on."""
    whole = text_document(text, 1, 1)
    blank = replace(whole, id="blank", turns=(replace(whole.turns[0], instruction="What is it?  "),))
    rows = [token_row(DocumentTokenizer(huggingface_tokenizer)(d)) for d in (whole, blank)]
    trimming = CHATML_TEMPLATE.replace("message.content", "message.content | trim")
    imported, counts = run(rows, TokenizerSpec(str(huggingface_folder), chat_template=trimming))
    assert [d.id for d in imported] == ["document 1"] and counts.dropped == {"other_tokens": 1}


def test_a_template_that_writes_no_conversation_is_refused(
    sentencepiece_tokenizer: ChatTokenizer, sentencepiece_file: Path, text: str, run: Importer
) -> None:
    row = token_row(DocumentTokenizer(sentencepiece_tokenizer)(text_document(text, 1, 1)))
    backwards = INST_TEMPLATE.replace("in messages", "in messages | reverse")
    with pytest.raises(ValueError, match=r"does not write the messages of a conversation one after another"):
        run([row], TokenizerSpec(str(sentencepiece_file), chat_template=backwards))
