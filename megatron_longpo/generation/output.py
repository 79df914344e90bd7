"""The output folder: what it was started with, and the files that all tasks together end in.

OUTPUT/pairs.jsonl      the pairs, in the order of the documents; the same bytes however the run went
OUTPUT/report.json      what became of documents and turns
OUTPUT/timings.jsonl    seconds and tokens of every document
OUTPUT/state/           settings.json, and a folder of every task with its answers, its lock and its log
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_longpo.files import atomic_writer, check_folder_writable, exclusive_lock, write_json
from megatron_longpo.generation.corpus import corpus_files, count_documents, read_corpus
from megatron_longpo.generation.model_files import require_model_files
from megatron_longpo.generation.prompts import prompt_writer
from megatron_longpo.generation.report import REPORT, GenerationReport
from megatron_longpo.generation.rollout import Outcome
from megatron_longpo.generation.settings import GenerationSettings
from megatron_longpo.generation.store import STATE, finished_mark, read_outcomes, store_file
from megatron_longpo.pair_formats.raw import GENERATED_PAIRS
from megatron_longpo.pairs import PreferenceDocument, Turn, write_pairs

PAIRS, TIMINGS = GENERATED_PAIRS, "timings.jsonl"
SCHEMA = 1


def prepare_output(settings: GenerationSettings) -> None:
    """Record what decides the content; a run that goes on must be given the same.

    Raises:
        ValueError: The folder was started with other flags or documents, holds something else, or cannot be written;
            model folder, tokenizer or a document of a run that starts is unusable.
    """
    folder = Path(settings.output)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output {folder} is a file: give a folder")
    file = folder / STATE / "settings.json"
    now: dict[str, Any] = {
        "schema": SCHEMA,
        "settings": settings.content(),
        "prompt_hash": prompt_writer(settings).hash,
        "documents": [[str(path), path.stat().st_size] for path in corpus_files(settings.documents)],
    }
    if not file.exists():
        others = [path.name for path in folder.iterdir() if path.name != STATE] if folder.exists() else []
        if others:
            raise ValueError(f"--output {folder} is not empty ({', '.join(sorted(others)[:3])}): give another folder")
        require_model_files(settings)
        _look_through(settings)
        # Not in the folder itself: to another task that starts now it must look empty.
        check_folder_writable(folder / STATE, "--output")
        write_json(file, now)
        return
    before = _recorded(file, now)
    different = [
        f"--{name.replace('_', '-').replace('num-tasks', 'tasks')} was {before['settings'].get(name)!r}, now {value!r}"
        for name, value in now["settings"].items()
        if before["settings"].get(name) != value
    ]
    if before["prompt_hash"] != now["prompt_hash"] and not different:
        different.append("the wording of the prompts, or the chat template, changed")
    if before["documents"] != now["documents"] and not different:
        different.append("the files of --documents were other ones, or had other sizes")
    if different:
        raise ValueError(
            f"--output {folder} was started with something else: {'; '.join(different)}. Give the same to go on, or "
            "another folder to start anew"
        )


def _recorded(file: Path, now: dict[str, Any]) -> dict[str, Any]:
    """What an earlier run recorded, with entries of the same types as ``now``."""
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(before, dict) or before.get("schema") != SCHEMA:
            raise ValueError(f"it has no 'schema': {SCHEMA}")
        if wrong := [name for name, value in now.items() if not isinstance(before.get(name), type(value))]:
            raise ValueError(f"without a {wrong[0]!r} as this version writes it")
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file} is not what tools/generate_pairs.py wrote ({error}): restore it, or give another --output"
        ) from error
    return before


def _look_through(settings: GenerationSettings) -> None:
    """Find a bad row before the first answer: to mend it changes the documents, and a run cannot go on with others."""
    total = count_documents(settings) if settings.progress else None
    documents = read_corpus(settings)
    for _ in tqdm(documents, "checking", total, unit="document", disable=not settings.progress, delay=2):
        pass


def write_results(settings: GenerationSettings) -> GenerationReport:
    """Write the three files, once every task is finished.

    Raises:
        ValueError: A task is not finished, another process writes, or no document gave a pair.
    """
    folder = Path(settings.output)
    complaint = f"--output {folder}: another process is writing the results there; wait for it"
    report = GenerationReport()
    lock = exclusive_lock(folder / STATE / "results.lock", complaint)
    with lock, atomic_writer(folder / TIMINGS) as timings:
        write_pairs(folder / PAIRS, _documents(settings, report, timings))
        write_json(folder / REPORT, report.to_dict(settings.content()))
    return report


def _documents(settings: GenerationSettings, report: GenerationReport, timings: Any) -> Iterator[PreferenceDocument]:
    outcomes = [_outcomes(settings, task) for task in range(settings.num_tasks)]
    bar = tqdm(read_corpus(settings), desc="writing", unit="document", disable=not settings.progress, delay=5)
    for document in bar:
        task = document.index % settings.num_tasks
        outcome, seconds = next(outcomes[task], (None, 0.0))
        if outcome is None or (outcome.index, outcome.id) != (document.index, document.id):
            raise ValueError(
                f"document {document.id!r} has not been answered yet: task {task} of {settings.num_tasks} is not "
                f"finished; run it again with --task {task}"
            )
        report.add(outcome, seconds)
        cost = {"prompt_tokens": outcome.prompt_tokens, "completion_tokens": outcome.completion_tokens}
        timings.write(json.dumps({"id": outcome.id, "seconds": round(seconds, 3), **cost}, ensure_ascii=False) + "\n")
        if outcome.turns:
            yield _as_pairs(document.text, outcome, settings)
    if report.documents_with_pairs == 0:
        raise ValueError(f"no document gave a pair, so there is no {PAIRS} in --output:\n{report.table()}")


def is_finished(settings: GenerationSettings, task: int) -> bool:
    """Whether a task has come to its end, and its outcomes are there."""
    return finished_mark(settings.output, task).exists() and store_file(settings.output, task).exists()


def all_finished(settings: GenerationSettings) -> bool:
    """Whether every task has come to its end."""
    return all(is_finished(settings, task) for task in range(settings.num_tasks))


def _outcomes(settings: GenerationSettings, task: int) -> Iterator[tuple[Outcome, float]]:
    file = store_file(settings.output, task)
    if not file.exists():
        raise ValueError(
            f"--output {settings.output}: task {task} of {settings.num_tasks} has not run; start it with --task {task}"
        )
    return read_outcomes(file)


def _as_pairs(text: str, outcome: Outcome, settings: GenerationSettings) -> PreferenceDocument:
    turns = tuple(
        Turn(
            turn.instruction,
            turn.chosen,
            turn.rejected,
            text[slice(*turn.chunk_span)],
            turn.chunk_span,
            {
                "tokens": {
                    "chunk": turn.chunk_tokens,
                    "chosen": turn.chosen_tokens,
                    "rejected": turn.rejected_tokens,
                }
            },
        )
        for turn in outcome.turns
    )
    # Nothing here may differ between two runs: no time, no machine, no order.
    provenance = {
        "model": settings.model,
        "revision": settings.model_revision,
        "engine": settings.engine,
        "sampling": {
            "instructions": {"temperature": settings.temperature, "top_p": settings.top_p},
            "answers": {"temperature": 0, "max_tokens": settings.max_answer_tokens},
        },
        "long_rotary_base": settings.long_rotary_base,
        "seed": settings.seed,
        "prompt_hash": prompt_writer(settings).hash,
        "tokens": {
            "document": outcome.document_tokens,
            "prompts": outcome.prompt_tokens,
            "answers": outcome.completion_tokens,
        },
    }
    return PreferenceDocument(outcome.id, text, turns, provenance)
