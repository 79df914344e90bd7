"""What a run checks before anything is built: whether the dataset is of the tokenizer that is given."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from megatron_longpo.arguments import parse_arguments
from megatron_longpo.data.records import RecordWriter
from megatron_longpo.data.tokenizer import load_tokenizer
from megatron_longpo.training.prepare import open_dataset
from tests.data.samples import random_document


def save_tokenizer(folder: Path, words: str) -> Path:
    numbers = {word: number for number, word in enumerate(words.split())}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(numbers, "a")), eos_token="b")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def test_a_dataset_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    ours, other = save_tokenizer(tmp_path / "ours", "a b c"), save_tokenizer(tmp_path / "other", "a b d")
    with RecordWriter(tmp_path / "pairs") as writer:
        writer.add(random_document(0))
        writer.finish(tokenizer={"path": str(ours), "hash": load_tokenizer(ours).hash})
    words = [f"--data-path={tmp_path / 'pairs'}", "--vocab-size=100000"]
    assert len(open_dataset(parse_arguments([*words, f"--tokenizer-model={ours}"]))) == 1
    with pytest.raises(ValueError, match=rf"--tokenizer-model {other} is not .* was made with \({ours}\): prepro"):
        open_dataset(parse_arguments([*words, f"--tokenizer-model={other}"]))
