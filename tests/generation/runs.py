"""Runs of the whole pipeline, in this process and as the command of a user."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from megatron_longpo.generation.output import PAIRS, REPORT, prepare_output, write_results
from megatron_longpo.generation.runner import run_task
from megatron_longpo.generation.settings import GenerationSettings
from tests.generation.conftest import LENGTHS

REPOSITORY = Path(__file__).parents[2]


def run(settings: GenerationSettings) -> bytes:
    """Every task, then the results; returns the pairs file."""
    prepare_output(settings)
    for task in range(settings.num_tasks):
        run_task(settings, task)
    write_results(settings)
    return Path(settings.output, PAIRS).read_bytes()


def report(settings: GenerationSettings) -> dict[str, Any]:
    return json.loads(Path(settings.output, REPORT).read_text())


def command(settings: GenerationSettings) -> list[str]:
    flags = ["--documents", *settings.documents, "--output", settings.output, "--engine", settings.engine]
    flags += ["--model", settings.model, "--base-url", str(settings.base_url)]
    flags += [
        "--tokenizer-model",
        str(settings.tokenizer_model),
        "--no-progress",
        "--concurrency",
        str(settings.concurrency),
    ]
    for name, value in LENGTHS.items():
        flags += [f"--{name.replace('_', '-')}", str(value)]
    return [sys.executable, "tools/generate_pairs.py", *flags]
