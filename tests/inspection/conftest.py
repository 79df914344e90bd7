"""Pairs of real text in every format that the inspection tests share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_longpo.data.chat_tokenizer import ChatTokenizer
from megatron_longpo.data.tokenize import DocumentTokenizer
from megatron_longpo.data.tokenizer import TokenizerSpec
from megatron_longpo.pairs import write_pairs
from tests.data.conftest import (  # noqa: F401  (fixtures)
    INST_TEMPLATE,
    inst_template_file,
    sentencepiece_file,
    sentencepiece_tokenizer,
    text,
)
from tests.tokenized_rows import text_document, token_row

REPORT: dict[str, Any] = {
    "schema": 1,
    "settings": {"seed": 0},
    "documents": {"read": 15, "with_pairs": 12, "dropped": {"too_short": 2, "no_pairs_left": 1}},
    "turns": {"planned": 40, "kept": 30, "dropped": {"identical_answers": 10}},
    "tokens": {"prompt": 123_456, "completion": 789},
    "seconds": 4000.0,
}

INJECTION = "</div><script>alert(1)</script><img src=x onerror=alert(2)>&amp;"
"""What a document may hold and a page must show as text."""


@pytest.fixture
def generated(tmp_path: Path, text: str) -> Path:  # noqa: F811
    """An output folder of generation: 12 documents with 1 to 4 turns, an intermediate file, a report."""
    folder = tmp_path / "generated"
    write_pairs(folder / "pairs.jsonl", [text_document(text, number, 1 + number % 4) for number in range(12)])
    (folder / "parts").mkdir()
    (folder / "parts" / "requests.jsonl").write_text('{"not": "a pair"}\n')
    (folder / "report.json").write_text(json.dumps(REPORT))
    return folder


@pytest.fixture
def spec(sentencepiece_file: Path) -> TokenizerSpec:  # noqa: F811
    """The tokenizer of `tokenized`. Not a Hugging Face one: importing transformers takes seconds."""
    return TokenizerSpec(str(sentencepiece_file), chat_template=INST_TEMPLATE)


@pytest.fixture
def tokenized(tmp_path: Path, text: str, sentencepiece_tokenizer: ChatTokenizer) -> Path:  # noqa: F811
    """Two tokenized rows, of two and three turns."""
    tokenize = DocumentTokenizer(sentencepiece_tokenizer)
    rows = [token_row(tokenize(text_document(text, number, 1 + number))) for number in (1, 2)]
    path = tmp_path / "tokens.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
