"""Speed and peak memory of a training step: shared prefix, two full sequences, TRL's DPOTrainer.

    python tools/benchmark_step.py
    python tools/benchmark_step.py --prefix-tokens 4096 8192
    python tools/benchmark_step.py --variants shared_prefix two_sequences --json

Every variant runs in processes of its own, taken in turn; the object of --json is about the last length.
A step is the trainer's whole optimizer step on one document: forward, backward, check of gradients, clipping, Adam. The
reference log-probs are there beforehand, nothing is recomputed, and all variants start from the same weights and must
have the same loss.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.step.case import StepCase, write_files
from benchmarks.step.measure import VARIANTS, Measurement
from benchmarks.step.summary import (
    COMPARISONS,
    PYTHONPATH,
    ROOT,
    circumstances,
    markdown,
    replace_section,
    summarize,
    table,
)
from megatron_longpo.help_format import HelpFormatter

_MAIN_VARIANTS = ("shared_prefix", "two_sequences")
"""Those with a target of speed are measured in every round, the others once."""
RELATIVE_COST = {
    "shared_prefix": 1.0,
    "two_sequences": 1.9,
    "two_sequences_full_logits": 2.4,
    "shared_prefix_dpo": 0.9,
    "trl": 2.8,
    "lm_head": 1.2,
}
"""Time of a step, for the progress bar's estimate."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark that the command line asks for; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        cases = [_case(arguments, prefix_tokens) for prefix_tokens in arguments.prefix_tokens]
        _run(arguments, cases)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"benchmark_step.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _run(arguments: argparse.Namespace, cases: Sequence[StepCase]) -> None:
    if arguments.device == "cuda":
        from megatron_longpo import platform

        if not platform.has_cuda():
            raise ValueError("--device cuda: this machine has no CUDA device; use --device cpu")
    for name in ("steps", "rounds", "threads"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} {getattr(arguments, name)} must be at least 1")
    # With several threads CPU time would hide that some of them wait.
    by_cpu_time = arguments.device == "cpu" and arguments.threads == 1
    jobs = [_schedule(arguments, case, last=case is cases[-1]) for case in cases]
    num_processes = sum(map(len, jobs))
    print(f"{num_processes} processes of {arguments.steps} steps, one after another; the fastest step counts")
    total = sum(_cost(arguments, case, name) for case, names in zip(cases, jobs, strict=True) for name in names)
    summaries = []
    with tqdm(total=total, bar_format="{l_bar}{bar}| {elapsed} of about {remaining} more") as bar:
        for case, names in zip(cases, jobs, strict=True):
            measured: dict[str, list[Measurement]] = {}
            with tempfile.TemporaryDirectory(prefix="benchmark-step-") as folder:
                bar.set_description(f"P {case.prefix_tokens}: writing weights and data")
                write_files(case, Path(folder))
                for name in names:
                    bar.set_description(f"P {case.prefix_tokens}: {name}")
                    step = _cost(arguments, case, name) / arguments.steps
                    run = run_variant(
                        case,
                        name,
                        Path(folder),
                        arguments.steps,
                        arguments.threads,
                        lambda step=step: bar.update(step),  # type: ignore[misc]
                    )
                    measured.setdefault(name, []).append(run)
            summaries.append(summarize(case, measured, by_cpu_time))
    around = circumstances(arguments.threads, by_cpu_time)
    for summary in summaries:
        print(f"\n{table(summary)}")
    print(f"\ns/step is {around['time']}; tokens are those of both conversations; {json.dumps(around)}")
    if arguments.docs:
        machine = arguments.machine or around["machine"]
        replace_section(Path(arguments.docs), arguments.device, markdown(summaries, around, machine))
        print(f"wrote the ratios to {arguments.docs}")
    if arguments.json:
        others = {str(summary["case"]["prefix_tokens"]): summary for summary in summaries[:-1]}
        print(json.dumps({**summaries[-1], **around, "other_prefix_tokens": others}))


def _schedule(arguments: argparse.Namespace, case: StepCase, last: bool) -> list[str]:
    """Which variants to run for a case, in order: A B A B, so that a disturbance does not hit one of them alone."""
    available = available_variants(case)
    chosen = [name for name in arguments.variants if name in available]
    if not last and "lm_head" in chosen:
        chosen.remove("lm_head")  # does not depend on the length
    again = [name for name in chosen if name in _MAIN_VARIANTS]
    return chosen + again * (arguments.rounds - 1)


def available_variants(case: StepCase) -> list[str]:
    """The variants that can compute a case; says why where TRL cannot."""
    missing = None
    if case.turns > 1:
        missing = "it has no conversations of several turns as one comparison"
    elif importlib.util.find_spec("trl") is None:
        missing = "it is not installed (pip install 'megatron_longpo[dev]')"
    if missing is None:
        return list(VARIANTS)
    print(f"P {case.prefix_tokens}, n {case.turns}: no comparison with TRL: {missing}")
    return [name for name in VARIANTS if COMPARISONS["trl"] != name != "trl"]


def _cost(arguments: argparse.Namespace, case: StepCase, variant: str) -> float:
    return arguments.steps * RELATIVE_COST[variant] * case.pair_tokens


def run_variant(
    case: StepCase,
    variant: str,
    folder: Path,
    num_steps: int,
    num_threads: int,
    step_done: Callable[[], Any] = lambda: None,
) -> Measurement:
    """Run one variant in a process of its own to its end.

    Args:
        case: Whose files `write_files` wrote.
        variant: One of `VARIANTS`.
        folder: Where the files are.
        num_steps: Steps.
        num_threads: Threads of PyTorch.
        step_done: Called after every step.

    Raises:
        RuntimeError: The process failed; the message ends with what it wrote last.
    """
    words = [variant, str(folder), str(num_steps), json.dumps(dataclasses.asdict(case))]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(num_threads),
        # Otherwise glibc keeps a heap per thread, and the peak depends on which thread freed what; and with a threshold
        # that it moves by itself, tensors of up to 32 MiB leave holes in that heap, up to half of a peak.
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": str(2**20),
        "PYTHONPATH": PYTHONPATH,
        "HF_HOME": str(folder / "huggingface"),
        "HF_HUB_OFFLINE": "1",
    }
    if case.device == "cpu":
        environment["LONGPO_USE_CPU"] = "1"
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    last: dict[str, Any] = {}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.step.measure", *words],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        with _killed_on_error(process):
            assert process.stdout is not None
            for line in process.stdout:
                last = json.loads(line)
                if "losses" not in last:
                    step_done()
            code = process.wait()
        if code != 0:
            errors.seek(0)
            raise RuntimeError(f"variant {variant} ended with exit code {code}:\n{errors.read()[-4000:]}")
    return Measurement(**last)


@contextlib.contextmanager
def _killed_on_error(process: subprocess.Popen[str]) -> Any:
    try:
        yield
    except BaseException:
        process.kill()
        process.wait()
        raise


def _case(arguments: argparse.Namespace, prefix_tokens: int) -> StepCase:
    names = {field.name for field in dataclasses.fields(StepCase)} - {"prefix_tokens"}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    case = StepCase(prefix_tokens=prefix_tokens, **given)
    case.check()
    return case


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmark_step.py", description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False
    )
    add, default = parser.add_argument, StepCase()

    def size(flag: str, text: str) -> None:
        value = getattr(default, flag.removeprefix("--").replace("-", "_"))
        add(flag, type=int, default=value, metavar="N", help=text)

    add(
        "--prefix-tokens",
        type=int,
        nargs="+",
        default=[default.prefix_tokens],
        metavar="N",
        help=f"lengths of the document with its first instruction (default: {default.prefix_tokens})",
    )
    size("--response-tokens", "length of every response")
    size("--turns", "turns of the document, in one conversation")
    size("--num-layers", "layers of the model")
    size("--hidden-size", "width of the model")
    size("--ffn-hidden-size", "inner width of its MLPs")
    size("--num-attention-heads", "query heads")
    size("--num-query-groups", "key/value heads")
    size("--vocab-size", "tokens")
    variants = f"{', '.join(VARIANTS)} (default: all)"
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME", help=variants)
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute")
    add("--bf16", action="store_true", help="bf16 instead of fp32, on cuda")
    add("--threads", type=int, default=1, metavar="N", help="threads of PyTorch; 1 is steady on a busy machine")
    add("--steps", type=int, default=3, metavar="N", help="steps per process, of which the fastest counts")
    add("--rounds", type=int, default=2, metavar="N", help="processes of the first two variants; others have one")
    add("--docs", metavar="FILE", help="put the ratios between this device's markers in a Markdown file")
    add("--machine", metavar="TEXT", help="how --docs describes the machine (default: cores and architecture)")
    add("--json", action="store_true", help="print one JSON object as the last line")
    return parser
