"""Documents of real text, a tokenizer, and a run of the pipeline against a real local server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from benchmarks.generation.chat_server import MODEL
from megatron_longpo.generation.settings import GenerationSettings

# The tokenizers of the data tests serve here too.
from tests.data.conftest import (  # noqa: F401
    huggingface_folder,
    huggingface_tokenizer,
    inst_template_file,
    sentencepiece_file,
    text,
)

NUM_DOCUMENTS = 12
DOCUMENT_CHARS = 6000


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents from the language reference; the last ones are too short and too long."""
    whole = "\n\n".join(topics[name] for name in sorted(topics))
    starts = range(0, NUM_DOCUMENTS * 20_000, 20_000)
    texts = [whole[start : start + DOCUMENT_CHARS] for start in starts]
    texts += ["Only a few words, and no more.", whole[:40_000]]
    path = tmp_path_factory.mktemp("corpus") / "documents.jsonl"
    path.write_text("".join(json.dumps({"id": f"doc-{i}", "text": t}) + "\n" for i, t in enumerate(texts)))
    return path


LENGTHS = {
    "min_document_tokens": 300,
    "target_length": 6000,
    "min_chunk_tokens": 200,
    "max_chunk_tokens": 500,
}
"""In tokens; the documents of `corpus` have one to three thousand."""

Settings = Callable[..., GenerationSettings]


@pytest.fixture
def settings(corpus: Path, huggingface_folder: Path, tmp_path: Path) -> Settings:  # noqa: F811
    """Makes settings for `corpus` and the server of the tests."""

    def make(**changes: object) -> GenerationSettings:
        values: dict[str, object] = {
            "documents": (str(corpus),),
            "output": str(tmp_path / "pairs"),
            "engine": "openai",
            "model": MODEL,
            "base_url": "http://127.0.0.1:9/v1",
            "tokenizer_model": str(huggingface_folder),
            "progress": False,
            **LENGTHS,
        }
        return GenerationSettings(**{**values, **changes})  # type: ignore[arg-type]

    return make
