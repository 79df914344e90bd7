"""The command line of ``tools/generate_pairs.py``.

What does the work is imported when it is needed: ``--help`` and wrong flags do not wait for torch and datatrove.
"""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_longpo.generation.engine import EngineError
from megatron_longpo.generation.settings import ENGINES, FILTERS, OPENAI, TRANSFORMERS, GenerationSettings

_EXAMPLES = """\
the model in this process, on a GPU or a CPU:
  python tools/generate_pairs.py --documents 'corpus/*.jsonl' --output pairs/ --engine transformers --model DIR

a server, or many behind one address:
  vllm serve DIR --served-model-name NAME --enable-prefix-caching
  python tools/generate_pairs.py --documents 'corpus/*.jsonl' --output pairs/ --engine openai \\
      --base-url http://127.0.0.1:8000/v1 --model NAME --tokenizer-model DIR

The same command goes on after an interruption. docs/generation.md has the rest, Slurm included."""

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(GenerationSettings)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the pipeline; returns the exit code: 0, 1 for the engine or a file, 2 for flags, 130 for Ctrl-C."""
    arguments = vars(_parser().parse_args(argv))
    # The scheduler's SIGTERM ends the run like Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    task = arguments.pop("task")
    try:
        settings = _settings(arguments)
        if task is not None and not 0 <= task < settings.num_tasks:
            raise ValueError(f"--task {task} must be at least 0 and less than --tasks {settings.num_tasks}")
    except ValueError as error:
        print(f"generate_pairs.py: error: {error}", file=sys.stderr)
        return 2
    try:
        return _run(settings, task)
    except (ValueError, OSError, EngineError) as error:
        print(f"generate_pairs.py: error: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("megatron_longpo"):
            raise
        print(f"generate_pairs.py: error: {error}: pip install 'megatron_longpo[generate]'", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("generate_pairs.py: stopped; what has been answered is kept, the same command goes on", file=sys.stderr)
        return 130


def _run(settings: GenerationSettings, task: int | None) -> int:
    from megatron_longpo.files import LockHeldError
    from megatron_longpo.generation.logs import log_to
    from megatron_longpo.generation.output import PAIRS, all_finished, prepare_output, write_results
    from megatron_longpo.generation.runner import run_task
    from megatron_longpo.generation.store import STATE

    prepare_output(settings)
    for number in range(settings.num_tasks) if task is None else [task]:
        log_to(Path(settings.output, STATE, f"{number:05d}", "log"))
        run_task(settings, number)
    if not all_finished(settings):
        print(f"task {task} of {settings.num_tasks} is finished; the last one to finish writes {PAIRS}")
        return 0
    try:
        report = write_results(settings)
    except LockHeldError:
        if task is None:
            raise
        print(f"all tasks are finished; another one is writing {PAIRS}")
        return 0
    print(report.table())
    print(f"wrote {Path(settings.output, PAIRS)}; look at it: python tools/inspect_pairs.py {settings.output}")
    return 0


def _settings(arguments: dict[str, object]) -> GenerationSettings:
    documents, filters, template = (arguments.pop(name) for name in ("documents", "filters", "prompt_template"))
    assert isinstance(documents, list) and isinstance(filters, list) and isinstance(template, str)
    return GenerationSettings(
        documents=tuple(documents),
        filters=tuple(filters),
        prompt_template=template.replace("\\n", "\n"),
        **arguments,  # type: ignore[arg-type]
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="generate_pairs.py",
        description="Let a model make its own short-to-long preference pairs from long documents.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def flag(group: argparse._ArgumentGroup, name: str, help: str, **options: object) -> None:
        field = str(options.get("dest") or name.removeprefix("--").replace("-", "_"))
        default = _DEFAULTS.get(field, dataclasses.MISSING)
        if default is not dataclasses.MISSING and "default" not in options and "action" not in options:
            options["default"] = default
            help += f" (default: {default})" if default is not None else ""
        group.add_argument(name, help=help, **options)  # type: ignore[arg-type]

    group = parser.add_argument_group("input and output")
    flag(
        group,
        "--documents",
        "files, folders or quoted patterns: .jsonl, .jsonl.gz, .parquet, `datasets` folders, text files",
        nargs="+",
        required=True,
        metavar="PATH",
    )
    flag(group, "--output", "folder for pairs.jsonl, report.json and the state", required=True, metavar="DIR")
    flag(group, "--text-field", "field or column with the text", metavar="NAME")
    flag(group, "--id-field", "field or column with the id; without it: file name and line", metavar="NAME")
    flag(group, "--max-documents", "read only the first N documents", type=int, metavar="N")
    flag(group, "--seed", "with a document's id decides all that is drawn for it", type=int)

    group = parser.add_argument_group("engine")
    flag(group, "--engine", "the model in this process, or a server", choices=ENGINES, required=True)
    flag(group, "--model", "folder of the model, or the name under which it is served", required=True)
    flag(group, "--tokenizer-model", "its tokenizer's folder; by default --model's", metavar="DIR")
    flag(group, "--model-revision", "recorded in the provenance", metavar="TEXT")

    group = parser.add_argument_group(f"--engine {OPENAI}; the key comes from the environment, OPENAI_API_KEY")
    flag(group, "--base-url", "the server, such as http://127.0.0.1:8000/v1", metavar="URL")
    flag(group, "--long-base-url", "another server for whole documents, with a larger RoPE base say", metavar="URL")
    flag(group, "--concurrency", "requests in flight", type=int, metavar="N")
    flag(group, "--request-timeout-s", "longest wait for a reply", type=float, metavar="SECONDS")
    flag(group, "--max-retries", "how often a failed request is sent again", type=int, metavar="N")
    flag(
        group, "--skip-failed-documents", "drop documents whose requests fail, instead of stopping", action="store_true"
    )

    group = parser.add_argument_group(f"--engine {TRANSFORMERS}")
    flag(group, "--long-rotary-base", "RoPE base for whole documents", type=float, metavar="BASE")
    flag(group, "--dtype", "type of the weights; by default the files'", choices=("fp32", "bf16", "fp16"))
    flag(group, "--device", "by default the first GPU, else the CPU")
    flag(group, "--batch-size", "rows decoded together", type=int, metavar="N")
    flag(group, "--prefill-tokens", "tokens of a prompt computed at once", type=int, metavar="TOKENS")

    group = parser.add_argument_group("documents and chunks, in tokens")
    flag(group, "--min-document-tokens", "shorter documents are dropped", type=int, metavar="TOKENS")
    flag(group, "--target-length", "longer documents are dropped", type=int, metavar="TOKENS")
    flag(group, "--min-chunk-tokens", "shortest chunk", type=int, metavar="TOKENS")
    flag(group, "--max-chunk-tokens", "longest chunk", type=int, metavar="TOKENS")
    flag(group, "--max-chunks-per-document", "chunks, and so turns, of a document", type=int, metavar="N")

    group = parser.add_argument_group("instructions and answers")
    flag(group, "--instructions-per-chunk", "instructions to ask for; one is drawn", type=int, metavar="N")
    flag(group, "--instruction-attempts", "how often to ask for a readable list", type=int, metavar="N")
    flag(group, "--temperature", "of instructions; answers are greedy", type=float)
    flag(group, "--top-p", "of instructions", type=float)
    flag(group, "--max-instruction-tokens", "longest list of instructions", type=int, metavar="TOKENS")
    flag(group, "--max-answer-tokens", "longest answer", type=int, metavar="TOKENS")
    flag(
        group,
        "--prompt-template",
        r"user message, the same as in preprocessing (default: '{document}\n\n{instruction}')",
        default=_DEFAULTS["prompt_template"],
        metavar="TEXT",
    )
    flag(
        group,
        "--instruction-template",
        "file with another request, with {chunk} and {num_instructions}",
        metavar="FILE",
    )
    flag(
        group,
        "--filters",
        f"what answers are dropped for: {', '.join(FILTERS)} (default: all)",
        nargs="*",
        default=list(FILTERS),
        metavar="NAME",
    )
    flag(group, "--max-repetition", "highest share of repeated word 4-grams", type=float, metavar="SHARE")

    group = parser.add_argument_group("many processes")
    flag(group, "--tasks", "parts of the documents", dest="num_tasks", type=int, metavar="N")
    flag(group, "--task", "run only this part; by default all, one after another", type=int, default=None, metavar="I")
    flag(group, "--workers", "processes that measure and cut documents", dest="num_workers", type=int, metavar="N")
    flag(group, "--no-progress", "no progress bar", dest="progress", action="store_false")
    return parser
