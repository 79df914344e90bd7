"""The command line of ``tools/generate_pairs.py``.

What does the work is imported when it is needed: ``--help`` and wrong flags do not wait for torch and datatrove.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_longpo.generation.engine import EngineError
from megatron_longpo.generation.flags import make_parser
from megatron_longpo.generation.settings import GenerationSettings, refuse_without_effect
from megatron_longpo.processes import no_interrupt_lost, take_sigterm_as_ctrl_c


def main(argv: Sequence[str] | None = None) -> int:
    """Run the pipeline; returns the exit code: 0, 1 for the engine or a file, 2 for flags, 130 for Ctrl-C."""
    arguments = vars(make_parser().parse_args(argv))
    take_sigterm_as_ctrl_c()
    task = arguments.pop("task", None)
    try:
        settings = _settings(arguments)
        if task is not None and not 0 <= task < settings.num_tasks:
            raise ValueError(f"--task {task} must be at least 0 and less than --tasks {settings.num_tasks}")
    except ValueError as error:
        print(f"generate_pairs.py: error: {error}", file=sys.stderr)
        return 2
    try:
        with no_interrupt_lost():
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
    from megatron_longpo.generation.output import PAIRS, all_finished, is_finished, prepare_output, write_results
    from megatron_longpo.generation.runner import run_task
    from megatron_longpo.generation.store import task_folder

    prepare_output(settings)
    for number in range(settings.num_tasks) if task is None else [task]:
        if is_finished(settings, number):
            continue  # it needs no model any more, nor a server that answers
        log_to(task_folder(settings.output, number) / "log")
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


def _settings(given: dict[str, Any]) -> GenerationSettings:
    """The settings of the flags that were given; the others keep their defaults."""
    refuse_without_effect(given["engine"], given)
    if "prompt_template" in given:
        given["prompt_template"] = given["prompt_template"].replace("\\n", "\n")
    for name in {"documents", "filters"} & given.keys():
        given[name] = tuple(given[name])
    return GenerationSettings(**given)
