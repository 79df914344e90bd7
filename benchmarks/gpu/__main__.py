"""Everything that is to be known about one GPU, in one command: python -m benchmarks.gpu

    rates      exactness of the attention kernels in bf16 and fp32, rates of matrix products and of attention
    speed      tokens/s and MFU of training steps over document length, against what those rates allow
    longest    the longest document that fits
    rivals     the step suite (`benchmarks.suite`) over length, as far as each variant survives

Writes benchmarks/results/gpu.json and the suite's files, with device, versions and commit. `--device cpu --tiny` runs
all of it in a minute on tiny sizes: it shows that the script works, and its numbers say nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.settings import PEAK_TFLOPS, REAL, TINY, Settings
from benchmarks.step.summary import ROOT, circumstances
from benchmarks.suite import RESULTS, Matrix, run_suite, write_results
from megatron_longpo.files import atomic_writer

_PARTS = ("rates", "speed", "longest", "rivals")
_NUM_STEPS = 3
_RESULT = "RESULT "


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts that the command line asks for; returns the exit code."""
    arguments = _parser().parse_args(argv)
    settings = TINY if arguments.tiny else REAL
    if arguments.measure:
        print(_RESULT + json.dumps(_measure(settings, arguments.measure)), flush=True)
        return 0
    try:
        _run(arguments, settings)
    except (ValueError, RuntimeError) as error:
        print(f"benchmarks.gpu: error: {error}", file=sys.stderr)
        return 1
    return 0


def _run(arguments: argparse.Namespace, settings: Settings) -> None:
    if arguments.device == "cpu":
        if not arguments.tiny:
            raise ValueError("--device cpu is for --tiny: the real sizes need a GPU")
        os.environ["LONGPO_USE_CPU"] = "1"
    from megatron_longpo import platform

    if arguments.device == "cuda" and not platform.has_cuda():
        raise ValueError("this machine has no CUDA device; --device cpu --tiny shows whether the script runs")
    device = platform.device_name()
    peak = arguments.peak_tflops or next((tflops for part, tflops in PEAK_TFLOPS.items() if part in device), None)
    if peak is None:
        raise ValueError(f"the peak of {device!r} is not known: give --peak-tflops (dense, in the training dtype)")
    result: dict[str, Any] = {**circumstances(0, by_cpu_time=False), "device": device, "peak_tflops": peak}

    def measure(*words: str) -> dict[str, Any]:
        return _in_process(arguments, words)

    if "rates" in arguments.parts or "speed" in arguments.parts:
        result["rates"] = measure("rates")
        print(json.dumps(result["rates"]), flush=True)
    if "speed" in arguments.parts:
        result["speed"] = {name: _speeds(settings, name, measure, result["rates"], peak) for name in settings.models}
    if "longest" in arguments.parts:
        result["longest"] = {name: _longest(settings, name, measure) for name in settings.models}
    results = arguments.results or RESULTS
    results.mkdir(parents=True, exist_ok=True)
    with atomic_writer(results / "gpu.json") as file:
        file.write(json.dumps(result, indent=2) + "\n")
    print(f"wrote {results / 'gpu.json'}", flush=True)
    if "rivals" in arguments.parts:
        matrix = Matrix(settings.rivals, settings.rival_lengths, settings.rival_lengths[:1])
        suite = run_suite(matrix, num_threads=max((os.cpu_count() or 2) // 2, 1), by_cpu_time=False, survives=True)
        name = arguments.device
        if arguments.results is None:
            write_results({**suite, "machine": device}, name)
        else:
            write_results({**suite, "machine": device}, name, results, docs=None)


def _speeds(
    settings: Settings, name: str, measure: Callable[..., dict[str, Any]], rates: dict[str, Any], peak: float
) -> list[dict[str, Any]]:
    """Speed at every length; a length that does not fit ends the list."""
    found: list[dict[str, Any]] = []
    for length in settings.lengths:
        entry = measure("speed", name, str(length), str(_NUM_STEPS))
        found.append(entry)
        if "error" not in entry:
            flops = entry["matmul_flops"] + entry["attention_flops"]
            entry["mfu"] = flops / entry["step_s"] / peak / 1e12
            possible = entry["matmul_flops"] / rates["matmul_tflops"] + entry["attention_flops"] / rates["both"]
            entry["time_over_possible"] = entry["step_s"] / (possible / 1e12)
        print(f"{name}: {json.dumps(entry)}", flush=True)
        if "error" in entry:
            break
    return found


def _longest(settings: Settings, name: str, measure: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """Doubles the document until it does not fit, then halves the interval three times."""
    fits, fails, why = 0, 0, ""
    length = settings.first_length
    halvings = 0
    while halvings < 3 and length <= settings.length_limit:
        entry = measure("speed", name, str(length), "1")
        print(f"{name}, {length} tokens: {entry.get('error', 'fits')}", flush=True)
        if "error" in entry:
            fails, why = length, entry["error"]
        else:
            fits = length
        halvings += fails > 0
        length = (fits + fails) // 2 if fails else 2 * length
    return {"fits_tokens": fits, "fails_tokens": fails or None, "why": why}


def _in_process(arguments: argparse.Namespace, words: Sequence[str]) -> dict[str, Any]:
    """One measurement in a process of its own, which may run out of memory: then its last line is the ``error``."""
    flags = [f"--device={arguments.device}", *(["--tiny"] if arguments.tiny else [])]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu", *flags, "--measure", *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    for line in done.stdout.splitlines():
        if line.startswith(_RESULT):
            return json.loads(line.removeprefix(_RESULT))
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    if words[0] == "rates":
        raise RuntimeError(f"the kernels do not work here: {last}")
    return {"prefix_tokens": int(words[2]), "error": last}


def _measure(settings: Settings, words: Sequence[str]) -> dict[str, Any]:
    if words[0] == "rates":
        from benchmarks.gpu.rates import attention_tflops, kernel_errors, matmul_tflops

        errors = kernel_errors()
        return {"matmul_tflops": matmul_tflops(settings), **attention_tflops(settings), "kernel_errors": errors}
    from benchmarks.gpu.training import speed

    _, name, length, num_steps = words
    with tempfile.TemporaryDirectory(prefix="benchmark-gpu-") as folder:
        return speed(settings.models[name], int(length), int(num_steps), Path(folder))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--parts", nargs="+", choices=_PARTS, default=list(_PARTS), help="what to run (default: all)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where (default: cuda)")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes")
    parser.add_argument("--peak-tflops", type=float, metavar="X", help="peak of a device that is not known here")
    parser.add_argument("--results", type=Path, metavar="DIR", help="write there, and not to the docs")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
