"""The flags of ``tools/generate_pairs.py`` as a table; their defaults are those of `GenerationSettings`."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from megatron_longpo.generation.settings import ENGINES, FILTERS, OPENAI, TRANSFORMERS, GenerationSettings
from megatron_longpo.help_format import HelpFormatter

_EXAMPLES = """\
the model in this process, on a GPU or a CPU:
  python tools/generate_pairs.py --documents 'corpus/*.jsonl' --output pairs/ \\
      --engine transformers --model DIR

a server, with room for whole documents:
  python tools/lengthen_model.py --hf-model DIR --save LONG_DIR \\
      --max-position-embeddings 135168
  vllm serve LONG_DIR --served-model-name NAME --max-model-len 135168 \\
      --enable-prefix-caching --generation-config vllm
  python tools/generate_pairs.py --documents 'corpus/*.jsonl' --output pairs/ \\
      --engine openai --base-url http://127.0.0.1:8000/v1 \\
      --model NAME --tokenizer-model DIR

After an interruption, the same command resumes. docs/generation.md has the rest."""

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(GenerationSettings)}

_N = {"type": int, "metavar": "N"}
_TOKENS = {"type": int, "metavar": "TOKENS"}

_Flag = tuple[str, str, dict[str, Any]]
"""Name, help, and what else `argparse` is told."""

_GROUPS: dict[str, list[_Flag]] = {
    "input and output": [
        (
            "--documents",
            "files, folders or quoted patterns: .jsonl, .json, .parquet, .arrow, text; the first two also as .gz",
            {"nargs": "+", "required": True, "metavar": "PATH"},
        ),
        ("--output", "folder for pairs.jsonl, report.json and the state", {"required": True, "metavar": "DIR"}),
        ("--text-field", "field or column with the text", {"metavar": "NAME"}),
        ("--id-field", "field or column with the id; where it is missing, file name and line", {"metavar": "NAME"}),
        ("--max-documents", "read only the first N documents (default: all)", _N),
        ("--seed", "with a document's id, decides everything that is drawn for it", {"type": int}),
    ],
    "engine": [
        ("--engine", "the model in this process, or a server", {"choices": ENGINES, "required": True}),
        ("--model", "folder of the model, or the name under which it is served", {"required": True}),
        (
            "--tokenizer-model",
            "its tokenizer: folder or SentencePiece .model (default: --model, with --engine transformers)",
            {"metavar": "DIR_OR_MODEL"},
        ),
        ("--model-revision", "recorded in the pairs' provenance", {"metavar": "TEXT"}),
    ],
    f"--engine {OPENAI}; the key comes from the environment, OPENAI_API_KEY": [
        ("--base-url", "the server, such as http://127.0.0.1:8000/v1", {"metavar": "URL"}),
        (
            "--long-base-url",
            "another server for whole documents, with a larger RoPE base say (default: --base-url)",
            {"metavar": "URL"},
        ),
        ("--concurrency", "requests in flight", _N),
        ("--request-timeout-s", "longest wait for a reply", {"type": float, "metavar": "SECONDS"}),
        ("--max-retries", "how often a failed request is sent again", _N),
        (
            "--skip-failed-documents",
            "drop documents whose requests fail, instead of stopping",
            {"action": "store_true"},
        ),
    ],
    f"--engine {TRANSFORMERS}": [
        ("--chat-template", "Jinja chat template (default: the tokenizer's own)", {"metavar": "FILE"}),
        (
            "--long-rotary-base",
            "RoPE base for whole documents (default: the model's)",
            {"type": float, "metavar": "BASE"},
        ),
        ("--dtype", "type of the weights (default: the files')", {"choices": ("fp32", "bf16", "fp16")}),
        ("--device", "where to compute (default: the first GPU, else the CPU)", {"metavar": "NAME"}),
        ("--batch-size", "rows decoded together", _N),
        ("--prefill-tokens", "tokens of a prompt computed at once", _TOKENS),
    ],
    "documents and chunks, in tokens": [
        ("--min-document-tokens", "shorter documents are dropped", _TOKENS),
        ("--target-length", "longer documents are dropped", _TOKENS),
        ("--min-chunk-tokens", "shortest chunk", _TOKENS),
        ("--max-chunk-tokens", "longest chunk", _TOKENS),
        ("--max-chunks-per-document", "chunks, and so turns, of a document", _N),
    ],
    "instructions and answers": [
        ("--instructions-per-chunk", "instructions to ask for; one is drawn", _N),
        ("--instruction-attempts", "how often to ask for a readable list", _N),
        ("--temperature", "of instructions; answers are greedy", {"type": float, "metavar": "T"}),
        ("--top-p", "of instructions", {"type": float, "metavar": "P"}),
        ("--max-instruction-tokens", "longest list of instructions", _TOKENS),
        ("--max-answer-tokens", "longest answer", _TOKENS),
        (
            "--prompt-template",
            r"user message, the same as in preprocessing; \n is a line break",
            {"metavar": "TEXT"},
        ),
        (
            "--instruction-template",
            "file with another request, with {chunk} and {num_instructions}",
            {"metavar": "FILE"},
        ),
        (
            "--filters",
            f"what answers are dropped for: {', '.join(FILTERS)} (default: all)",
            {"nargs": "*", "metavar": "NAME"},
        ),
        ("--max-repetition", "highest share of repeated word 4-grams", {"type": float, "metavar": "SHARE"}),
    ],
    "many processes": [
        ("--tasks", "parts of the documents", {"dest": "num_tasks"} | _N),
        (
            "--task",
            "run only this part (default: all, one after another)",
            {"type": int, "metavar": "I"},
        ),
        ("--workers", "processes that measure and cut documents", {"dest": "num_workers"} | _N),
        ("--no-progress", "no progress bar", {"dest": "progress", "action": "store_false"}),
    ],
}


def make_parser() -> argparse.ArgumentParser:
    """A parser whose results are fields of `GenerationSettings`, and ``task``; only of what is given."""
    parser = argparse.ArgumentParser(
        prog="generate_pairs.py",
        description="Let a model make its own short-to-long preference pairs from long documents.",
        epilog=_EXAMPLES,
        formatter_class=HelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for title, flags in _GROUPS.items():
        group = parser.add_argument_group(title)
        for name, help, options in flags:
            group.add_argument(name, help=help + _default(options.get("dest", _field(name))), **options)
    return parser


def _field(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _default(field: str) -> str:
    """The settings' default of a number or a text, for the help."""
    default = _DEFAULTS.get(field)
    shown = isinstance(default, (int, float, str)) and not isinstance(default, bool)
    return f" (default: {default})".replace("\n", r"\n") if shown else ""
