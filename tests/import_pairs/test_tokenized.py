"""Tokenized rows become the text that they were made of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_longpo.data.chat_tokenizer import ChatTokenizer
from megatron_longpo.data.tokenize import DocumentTokenizer, PromptTemplate
from megatron_longpo.data.tokenizer import TokenizerSpec
from megatron_longpo.import_pairs.convert import summary_table
from tests.data.conftest import INST_TEMPLATE
from tests.import_pairs.conftest import Importer
from tests.tokenized_rows import text_document, token_row


def test_tokenized_rows_come_back_as_the_text_they_were_made_of(
    tokenizer: ChatTokenizer,
    specs: dict[str, TokenizerSpec],
    text: str,
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


def test_a_tokenizer_that_puts_a_blank_before_every_piece(tmp_path: Path, text: str, run: Importer) -> None:
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
    tokenizer = spec.load()
    whole = text_document(text, 1, 3)
    tokenized = DocumentTokenizer(tokenizer)(whole)
    assert (
        tokenizer.encode(tokenizer.decode(tokenized.document_tokens))[0].tolist() != tokenized.document_tokens.tolist()
    )
    (imported,), _ = run([token_row(tokenized)], spec)
    assert replace(imported, provenance={}) == whole


def test_an_instruction_that_may_begin_earlier_is_reported(
    huggingface_tokenizer: ChatTokenizer,
    specs: dict[str, TokenizerSpec],
    text: str,
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
    huggingface_tokenizer: ChatTokenizer,
    specs: dict[str, TokenizerSpec],
    text: str,
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
