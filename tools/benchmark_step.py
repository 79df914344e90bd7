"""Time and peak memory of one training step: shared prefix, the same as two full sequences, and TRL's DPOTrainer.

    python tools/benchmark_step.py [--prefix-tokens 8192] [--response-tokens 128] [--turns 1] [--json]

A step is forward, backward, gradient clipping and Adam on one document in fp32 on the CPU. Each variant runs in
processes of its own, in turn (A B C A B C …), so that a disturbance of the machine does not hit one of them alone; its
time is the smallest of its rounds' medians. Memory is the peak above the idle interpreter with the same imports.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))  # for `benchmarks`, which is no part of the installed package

from benchmarks.problem import Problem, write_model  # noqa: E402

VARIANTS = ("shared-prefix", "two-sequences", "two-sequences-full-logits", "trl")
OURS, TWICE = VARIANTS[:2]


def main() -> None:
    """Measure every variant, print the table and, with --json, one line of JSON."""
    arguments = _parse()
    problem = Problem(arguments.prefix_tokens, arguments.response_tokens, arguments.turns)
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.variants}
    with tempfile.TemporaryDirectory() as folder:
        write_model(problem, Path(folder))
        for number in range(arguments.rounds):
            for name in arguments.variants:
                print(f"round {number + 1} of {arguments.rounds}: {name}", file=sys.stderr, flush=True)
                rounds[name].append(_measure(name, problem, folder, arguments))
    results = {name: _summary(measured, problem) for name, measured in rounds.items()}
    _check_losses(results)
    print(_table(results, problem))
    if arguments.json:
        print(json.dumps(_report(results, problem, arguments)))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--prefix-tokens", type=int, default=8192, help="document with its first instruction (default: 8192)")
    add("--response-tokens", type=int, default=128, help="each response (default: 128)")
    add("--turns", type=int, default=1, help="turns of the document, in one conversation (default: 1)")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="what to measure (default: all)")
    add("--rounds", type=int, default=2, help="processes per variant (default: 2)")
    add("--steps", type=int, default=3, help="measured steps per process, after one to warm up (default: 3)")
    add("--threads", type=int, default=os.cpu_count(), help="threads of PyTorch (default: all cores)")
    add("--json", action="store_true", help="end with one line of JSON")
    arguments = parser.parse_args()
    for name in ("prefix_tokens", "response_tokens", "turns", "rounds", "steps", "threads"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(arguments, name)} must be at least 1")
    return arguments


def _measure(name: str, problem: Problem, folder: str, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.worker", name, json.dumps(asdict(problem)), folder]
    command += [str(arguments.steps + 1), str(arguments.threads)]
    # Without it, glibc keeps a heap per thread and the peak depends on which thread freed what.
    environment = os.environ | {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": str(arguments.threads)}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"benchmark_step.py: error: variant {name} failed with code {done.returncode}:\n{done.stderr[-3000:]}")
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def _summary(measured: list[dict[str, Any]], problem: Problem) -> dict[str, Any]:
    """Best median of the rounds (first steps left out), worst peak."""
    seconds = min(statistics.median(process["seconds"][1:]) for process in measured)
    return {
        "seconds_per_step": seconds,
        "tokens_per_s": problem.conversation_tokens / seconds,
        "peak_mib": max(process["peak_mib"] - process["idle_mib"] for process in measured),
        "loss": measured[0]["loss"],
    }


def _check_losses(results: dict[str, dict[str, Any]]) -> None:
    """Variants of this package must compute the same loss, or their times do not compare."""
    losses = {name: result["loss"] for name, result in results.items() if result["loss"] is not None}
    if losses and max(losses.values()) - min(losses.values()) > 1e-4 * abs(min(losses.values())):
        sys.exit(f"benchmark_step.py: error: the variants' losses differ: {losses}")


def _table(results: dict[str, dict[str, Any]], problem: Problem) -> str:
    first = next(iter(results))
    lines = [
        f"P {problem.prefix_tokens:,} · R {problem.response_tokens} · {problem.turns} turn(s) · {problem.num_layers} "
        f"layers · hidden {problem.hidden_size} · {problem.num_heads}/{problem.num_kv_heads} heads · vocab "
        f"{problem.vocab_size:,} · fp32 · CPU",
        f"{'':<26} {'s/step':>8} {'tokens/s':>9} {'peak MiB':>9} {'time':>7} {'memory':>7}",
    ]
    for name, result in results.items():
        seconds, rate, peak = result["seconds_per_step"], result["tokens_per_s"], result["peak_mib"]
        time_ratio, memory_ratio = seconds / results[first]["seconds_per_step"], peak / results[first]["peak_mib"]
        lines.append(
            f"{name:<26} {seconds:>8.2f} {rate:>9,.0f} {peak:>9,.0f} {time_ratio:>6.2f}x {memory_ratio:>6.2f}x"
        )
    lines.append(f"time and memory are relative to {first}; tokens are those of both conversations")
    return "\n".join(lines)


def _report(results: dict[str, dict[str, Any]], problem: Problem, arguments: argparse.Namespace) -> dict[str, Any]:
    report: dict[str, Any] = {}
    if OURS in results:
        for name, key in ((TWICE, "two_sequences"), (VARIANTS[2], "two_sequences_full_logits"), ("trl", "trl")):
            if name in results:
                ours, theirs = results[OURS], results[name]
                report[f"speedup_vs_{key}"] = theirs["seconds_per_step"] / ours["seconds_per_step"]
                report[f"memory_ratio_vs_{key}"] = ours["peak_mib"] / theirs["peak_mib"]
    return report | {
        "results": results,
        "problem": asdict(problem),
        "rounds": arguments.rounds,
        "steps": arguments.steps,
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": arguments.threads,
            "system": platform.platform(),
        },
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in ("torch", "megatron-core", "transformers", "trl")},
        "commit": _commit(),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the working tree, with a + behind it when files have been changed since."""
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--abbrev=12", "--dirty=+"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


if __name__ == "__main__":
    main()
