"""Imports of rows, with the tokenizers of the data tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_longpo.data.tokenizer import TokenizerSpec
from megatron_longpo.import_pairs.convert import ImportCounts, ImportOptions, import_pairs
from megatron_longpo.pairs import PreferenceDocument, read_pairs
from tests.data.conftest import (  # noqa: F401  (fixtures)
    INST_TEMPLATE,
    huggingface_folder,
    huggingface_tokenizer,
    inst_template_file,
    sentencepiece_file,
    sentencepiece_tokenizer,
    text,
    tokenizer,
)


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
