"""Measure one GPU: python -m benchmarks.gpu

    rates      exactness of the attention kernels; rates of them and of matmuls
    speed      tokens/s, MFU and memory over document length and over what
               saves memory, against what those rates allow
    lengths    steps on documents of ever new lengths against known lengths
    rivals     the suite of `benchmarks.suite`, as far as each variant fits
    longest    the longest document that fits
    memory     what a dry run says of the memory of `speed`; uses no GPU

Every measurement is a process of its own, which imports what it needs while another one measures, and is stored in
benchmarks/results/gpu.json as soon as it is made. So a run may be stopped at any time, and the same command continues.
`--minutes 9` stops it cleanly, with exit code 3 if something is left. A failure is noted and stops nothing else; the
next run tries it again unless it ran out of memory.

`--device cpu --tiny` runs everything in a minute on tiny sizes: it shows that the script works, and its numbers mean
nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.processes import RESULT, Measurements, OutOfTime, workers
from benchmarks.gpu.results import StoredResults
from benchmarks.gpu.settings import REAL, TINY, Settings
from benchmarks.step.summary import circumstances
from benchmarks.suite import DOCS, RESULTS
from megatron_longpo.help_format import HelpFormatter, number_above_0

_PARTS = ("rates", "speed", "lengths", "rivals", "longest", "memory")
_LEFT = 3
"""Exit code of a run that is to go on."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts that the command line asks for; returns the exit code."""
    arguments = _parser().parse_args(argv)
    settings = TINY if arguments.tiny else REAL
    if arguments.work:
        return _work(settings, arguments.work)
    try:
        return _tabulate(arguments) if arguments.tabulate else _run(arguments, settings)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"benchmarks.gpu: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _run(arguments: argparse.Namespace, settings: Settings) -> int:
    if arguments.device == "cpu":
        if not arguments.tiny:
            raise ValueError("--device cpu is for --tiny: the real sizes need a GPU")
        os.environ["LONGPO_USE_CPU"] = "1"
    from megatron_longpo import platform

    if arguments.device == "cuda" and not platform.has_cuda():
        raise ValueError("this machine has no CUDA device; --device cpu --tiny shows whether the script runs")
    from benchmarks.gpu import parts

    flags = [f"--device={arguments.device}", *(["--tiny"] if arguments.tiny else [])]
    with (
        tempfile.TemporaryDirectory(prefix="benchmark-gpu-") as work,
        workers(flags, Path(work), parts.num_threads()) as processes,
    ):
        on_cpu = arguments.device == "cpu"
        device = {"name": platform.device_name()} if on_cpu else processes.measure(["device"], None)
        if "error" in device:
            raise RuntimeError(f"the device does not answer: {device['error']}")
        peak = _peak_tflops(arguments, device["name"])
        around = {**circumstances(parts.num_threads(), by_cpu_time=False), "device": device}
        folder = arguments.results or RESULTS
        stored = StoredResults(folder / "gpu.json", around, arguments.again)
        measure = Measurements(processes, stored, arguments.minutes)
        code = 0
        try:
            for part in arguments.parts:
                getattr(parts, part)(settings, measure)
        except OutOfTime:
            print("the time is over; the same command goes on where this one stopped", flush=True)
            code = _LEFT
        finally:
            _write(settings, stored, around, peak, DOCS if arguments.results is None and not arguments.tiny else None)
    failed = {name: entry for name, entry in stored.measured.items() if "error" in entry}
    for name, entry in failed.items():
        print(f"failed: {name}: {entry['error']}", flush=True)
    if code == 0 and any(not entry["out_of_memory"] for entry in failed.values()):
        code = 1
    return code


def _work(settings: Settings, folder: Path) -> int:
    """Import everything, wait for the words of a measurement on stdin, make it."""
    from benchmarks.gpu.measurements import measure

    words = json.loads(sys.stdin.read())
    print(RESULT + json.dumps(measure(settings, words, folder)), flush=True)
    return 0


def _write(
    settings: Settings, stored: StoredResults, around: dict[str, Any], peak_tflops: float, docs: Path | None
) -> None:
    """The file with its summary, the suite's files and the tables of the docs."""
    from benchmarks.gpu.summary import summary, write_summary

    found = summary(settings, stored.measured, peak_tflops, around["device"]["name"])
    stored.write(found)
    print(f"wrote {stored.path}", flush=True)
    write_summary(stored.path.parent, around, found, docs)


def _tabulate(arguments: argparse.Namespace) -> int:
    """Picture, tables and the file itself anew, of measurements that were made elsewhere."""
    os.environ["LONGPO_USE_CPU"] = "1"
    try:
        file = json.loads(arguments.tabulate.read_text(encoding="utf-8"))
    except ValueError:
        file = None
    if not isinstance(file, dict) or not {"device", "measured"} <= file.keys():
        raise ValueError(f"--tabulate {arguments.tabulate} is not what this program writes: give its gpu.json")
    folder = arguments.results or RESULTS
    # Not what a summary added; it is made anew.
    around = {name: file[name] for name in (*circumstances(1, by_cpu_time=False), "device") if name in file}
    stored = StoredResults(folder / "gpu.json", around, again=True)
    stored.measured = file["measured"]
    settings = TINY if arguments.tiny else REAL
    peak = _peak_tflops(arguments, around["device"]["name"])
    _write(settings, stored, around, peak, DOCS if arguments.results is None else None)
    return 0


def _peak_tflops(arguments: argparse.Namespace, device: str) -> float:
    from benchmarks.gpu.summary import known_gpu

    if arguments.peak_tflops:
        return float(arguments.peak_tflops)
    gpu = known_gpu(device)
    if gpu is None:
        raise ValueError(f"the peak of {device!r} is not known: give --peak-tflops (dense, in the training dtype)")
    return gpu.peak_tflops


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--parts", nargs="+", choices=_PARTS, default=list(_PARTS), metavar="PART", help="what to run (default: all)"
    )
    parser.add_argument(
        "--minutes", type=number_above_0, metavar="X", help="stop after this many (default: when all is measured)"
    )
    parser.add_argument("--again", action="store_true", help="forget what was measured before")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="where to measure; cpu only with --tiny"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument(
        "--peak-tflops", type=number_above_0, metavar="X", help="dense bf16 peak of a GPU that is not known here"
    )
    parser.add_argument(
        "--results", type=Path, metavar="DIR", help="write there; without it, into benchmarks/results and the docs"
    )
    parser.add_argument(
        "--tabulate", type=Path, metavar="GPU.json", help="measure nothing: picture and docs of a file from elsewhere"
    )
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
