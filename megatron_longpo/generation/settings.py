"""The flags of tools/generate_pairs.py: what decides the content of the pairs, and how the work is done."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from megatron_longpo.data.tokenize import DEFAULT_PROMPT_TEMPLATE, PromptTemplate

TRANSFORMERS, OPENAI = "transformers", "openai"
ENGINES = (TRANSFORMERS, OPENAI)

FILTERS = {
    "refusal": "the answer declines to answer",
    "repetition": "too many of the answer's word 4-grams occurred in it before",
    "length": "the answer was cut at --max-answer-tokens",
    "language": "the answer is in another language or script than its chunk",
}
"""What ``--filters`` can name; answers that are empty, or equal to their twin, are always dropped."""

LONGEST_CHUNK_TOKENS = 32768

_ASKING_A_SERVER = (
    "base_url",
    "long_base_url",
    "concurrency",
    "request_timeout_s",
    "max_retries",
    "skip_failed_documents",
)
OF_ENGINE = {
    OPENAI: _ASKING_A_SERVER,
    TRANSFORMERS: ("chat_template", "long_rotary_base", "dtype", "device", "batch_size", "prefill_tokens"),
}
"""Fields that only one engine uses."""

HOW_NOT_WHAT = frozenset(
    {*_ASKING_A_SERVER, "output", "num_workers", "batch_size", "prefill_tokens", "device", "progress"}
)
"""Fields that decide how the work is done; a run may go on with others. All the rest decides the content."""


@dataclass(frozen=True)
class GenerationSettings:
    """What a run of the pipeline is made with.

    Args:
        documents: ``--documents``: files, folders or patterns.
        output: ``--output``: folder of the results.
        engine: ``--engine``: ``transformers`` runs the model in this process, ``openai`` asks a server.
        model: ``--model``: a Hugging Face folder, or the name that the server knows the model by.
        tokenizer_model: ``--tokenizer-model``: counts tokens; the embedded engine's default is the model's folder.
        chat_template: ``--chat-template``: Jinja file for the embedded engine; None uses the tokenizer's own.
        model_revision: ``--model-revision``: recorded in the provenance, never interpreted.
        text_field, id_field: ``--text-field``, ``--id-field``: columns of tables and keys of JSON lines.
        max_documents: ``--max-documents``: read only so many; None reads all.
        min_document_tokens, target_length: Documents outside of these lengths are dropped.
        min_chunk_tokens, max_chunk_tokens: Length of a chunk.
        max_chunks_per_document: Chunks, and so turns, of a document.
        instructions_per_chunk: How many instructions the model is asked for; one is drawn.
        instruction_attempts: How often it is asked before a chunk is given up.
        temperature, top_p: Sampling of instructions; answers are greedy.
        max_instruction_tokens: Longest reply with a pool of instructions.
        max_answer_tokens: Longest answer.
        prompt_template: ``--prompt-template``: the same as in preprocessing.
        instruction_template: ``--instruction-template``: file with the request for instructions; None has our own.
        filters: ``--filters``: names in `FILTERS`.
        max_repetition: ``--max-repetition``: highest share of repeated word 4-grams.
        long_rotary_base: RoPE base of the model when it reads whole documents; embedded engine only.
        dtype: Type of the embedded engine's weights; None is the files'.
        seed: ``--seed``.
        num_tasks: ``--tasks``: parts that the documents are divided into, one process each.
        num_workers: ``--workers``: processes of a task that measure and cut documents; 1 works in its own.
        base_url, long_base_url: ``--base-url``: the server's ``…/v1``; another one for whole documents.
        concurrency: ``--concurrency``: requests in flight.
        request_timeout_s: ``--request-timeout-s``.
        max_retries: ``--max-retries``.
        skip_failed_documents: ``--skip-failed-documents``: drop what cannot be answered instead of stopping.
        batch_size: ``--batch-size``: rows that the embedded engine decodes together.
        prefill_tokens: ``--prefill-tokens``: tokens of a prompt that it computes at once.
        device: ``--device`` of the embedded engine; None chooses.
        progress: Show a progress bar.
    """

    documents: tuple[str, ...]
    output: str
    engine: str
    model: str
    tokenizer_model: str | None = None
    chat_template: str | None = None
    model_revision: str | None = None
    text_field: str = "text"
    id_field: str = "id"
    max_documents: int | None = None
    min_document_tokens: int = 65536
    target_length: int = 131072
    min_chunk_tokens: int = 16384
    max_chunk_tokens: int = 30000
    max_chunks_per_document: int = 4
    instructions_per_chunk: int = 4
    instruction_attempts: int = 3
    temperature: float = 0.7
    top_p: float = 0.9
    max_instruction_tokens: int = 1024
    max_answer_tokens: int = 2048
    prompt_template: str = DEFAULT_PROMPT_TEMPLATE
    instruction_template: str | None = None
    filters: tuple[str, ...] = tuple(FILTERS)
    max_repetition: float = 0.4
    long_rotary_base: float | None = None
    dtype: str | None = None
    seed: int = 0
    num_tasks: int = 1
    num_workers: int = 1
    base_url: str | None = None
    long_base_url: str | None = None
    concurrency: int = 64
    request_timeout_s: float = 1800.0
    max_retries: int = 8
    skip_failed_documents: bool = False
    batch_size: int = 4
    prefill_tokens: int = 4096
    device: str | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        self._check_engine()
        self._check_ranges()
        PromptTemplate(self.prompt_template)
        unknown = [name for name in self.filters if name not in FILTERS]
        if unknown:
            raise ValueError(f"--filters {' '.join(unknown)}: unknown; choose among {', '.join(FILTERS)}, or give none")

    def content(self) -> dict[str, Any]:
        """The fields that decide the content of the pairs, as JSON values."""
        fields = {name: value for name, value in dataclasses.asdict(self).items() if name not in HOW_NOT_WHAT}
        return dict(json.loads(json.dumps(fields)))

    def _check_engine(self) -> None:
        if self.engine not in ENGINES:
            raise ValueError(f"--engine {self.engine} is unknown: choose {' or '.join(ENGINES)}")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        values = {name: getattr(self, name) for name in defaults}
        refuse_without_effect(self.engine, {name: x for name, x in values.items() if x != defaults[name]})
        if self.engine == TRANSFORMERS:
            return
        if self.base_url is None:
            raise ValueError("--engine openai needs --base-url, such as http://127.0.0.1:8000/v1")
        for flag, value in (("--base-url", self.base_url), ("--long-base-url", self.long_base_url)):
            if value is not None:
                _check_url(flag, value)
        if self.tokenizer_model is None:
            raise ValueError(
                "--engine openai needs --tokenizer-model DIR, the model's tokenizer: documents and chunks are measured "
                "in its tokens"
            )

    def _check_ranges(self) -> None:
        at_least = {
            "--min-document-tokens": (self.min_document_tokens, 1),
            "--min-chunk-tokens": (self.min_chunk_tokens, 1),
            "--max-chunks-per-document": (self.max_chunks_per_document, 1),
            "--instructions-per-chunk": (self.instructions_per_chunk, 1),
            "--instruction-attempts": (self.instruction_attempts, 1),
            "--max-instruction-tokens": (self.max_instruction_tokens, 1),
            "--max-answer-tokens": (self.max_answer_tokens, 1),
            "--tasks": (self.num_tasks, 1),
            "--workers": (self.num_workers, 1),
            "--concurrency": (self.concurrency, 1),
            "--max-retries": (self.max_retries, 0),
            "--batch-size": (self.batch_size, 1),
            "--prefill-tokens": (self.prefill_tokens, 1),
            "--temperature": (self.temperature, 0),
            "--max-repetition": (self.max_repetition, 0),
        }
        if self.max_documents is not None:
            at_least["--max-documents"] = (self.max_documents, 1)
        for flag, (value, low) in at_least.items():
            if not (math.isfinite(value) and value >= low):
                raise ValueError(f"{flag} {value} must be at least {low}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p {self.top_p} must be in (0, 1]")
        if not 0 < self.request_timeout_s < math.inf:
            raise ValueError(f"--request-timeout-s {self.request_timeout_s} must be a number greater than 0")
        if self.long_rotary_base is not None and not 1 < self.long_rotary_base < math.inf:
            raise ValueError(f"--long-rotary-base {self.long_rotary_base} must be a number greater than 1")
        if self.max_chunk_tokens > LONGEST_CHUNK_TOKENS:
            raise ValueError(
                f"--max-chunk-tokens {self.max_chunk_tokens} must be at most {LONGEST_CHUNK_TOKENS}: a chunk is what a "
                "short-context model reads well (LongPO, section 3)"
            )
        for low_flag, low_value, high_flag, high_value in (
            ("--min-document-tokens", self.min_document_tokens, "--target-length", self.target_length),
            ("--min-chunk-tokens", self.min_chunk_tokens, "--max-chunk-tokens", self.max_chunk_tokens),
            ("--min-chunk-tokens", self.min_chunk_tokens, "--target-length", self.target_length),
        ):
            if low_value > high_value:
                raise ValueError(f"{low_flag} {low_value} is greater than {high_flag} {high_value}: change one of them")


def refuse_without_effect(engine: str, given: Mapping[str, Any]) -> None:
    """Raise ValueError where a field was given that only another engine, or a filter that is off, uses.

    Args:
        engine: ``--engine``.
        given: Fields of `GenerationSettings` and their values.
    """
    for other, names in OF_ENGINE.items():
        wrong = [name for name in names if name in given and other != engine]
        if not wrong:
            continue
        # An address may carry a key, and a switch has no value.
        silent = ("base_url", "long_base_url", "skip_failed_documents")
        flags = ["--" + name.replace("_", "-") + ("" if name in silent else f" {given[name]}") for name in wrong]
        hint = "leave it out" if len(flags) == 1 else "leave them out"
        if "chat_template" in wrong:
            hint += ". The server renders it: give it there (vllm serve … --chat-template FILE)"
        if "long_rotary_base" in wrong:
            hint += (
                ". A server has one RoPE base for all requests: make the model a second folder with the other base "
                f"(python tools/lengthen_model.py … --rotary-base {given['long_rotary_base']:g}), serve that too, and "
                "give its address as --long-base-url"
            )
        raise ValueError(
            f"{', '.join(flags)} {'has' if len(flags) == 1 else 'have'} no effect with --engine {engine}, "
            f"only with --engine {other}: {hint}"
        )
    if "max_repetition" in given and "repetition" not in given.get("filters", FILTERS):
        raise ValueError(
            f"--max-repetition {given['max_repetition']} has no effect without repetition in --filters: leave it out"
        )


def _check_url(flag: str, url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{flag} {url!r} must be an address such as http://127.0.0.1:8000/v1")
    if parts.username or parts.password or parts.query:
        # The address is not repeated: it would put the key into logs.
        raise ValueError(f"{flag} carries a user name, password or query: give keys by the environment, OPENAI_API_KEY")
