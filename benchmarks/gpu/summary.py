"""What follows from the measurements of the GPU benchmark: rates against each other, tables, the suite's cases."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import fastest_backend, rival_cases, rival_name, timed_steps
from benchmarks.gpu.processes import name_of
from benchmarks.gpu.settings import Settings
from benchmarks.step.measure import Measurement
from benchmarks.step.summary import replace_section, summarize
from benchmarks.suite import variants_of, write_results
from megatron_longpo.planning.hardware import GPU, GPUS

Measured = dict[str, dict[str, Any]]
"""Measurements by name."""


def write_summary(folder: Path, around: dict[str, Any], found: dict[str, Any], docs: Path | None) -> None:
    """Write the suite's files and, if asked to, the tables of the docs, as far as there is something to write.

    Args:
        folder: For the suite's JSON and picture.
        around: Device, versions, commit.
        found: Of `summary`.
        docs: The page.
    """
    name = around["device"]["name"]
    kind = "cpu" if name == "CPU" else "cuda"
    cases = found["rivals"]
    if cases and "shared_prefix" in cases[0]["variants"]:
        suite = {**around, "machine": name, "cases": cases, "failed": found["rivals_failed"]}
        write_results(suite, kind, folder, docs)
    if docs is not None:
        replace_section(docs, kind, table(around, found), "benchmark_gpu")


def summary(settings: Settings, measured: Measured, peak_tflops: float, device: str) -> dict[str, Any]:
    """What follows from the measurements that there are.

    Args:
        settings: Sizes.
        measured: By name.
        peak_tflops: Of the device, in the training dtype.
        device: Its name; if the planner knows it, its predictions stand beside the times.
    """
    gpu = known_gpu(device)
    backend = fastest_backend(measured)
    rates = {
        "matmul": measured.get("matmul", {}).get("tflops"),
        "both": measured.get(name_of("attention", backend), {}).get("both"),
    }
    speeds = []
    for shape, saving, length in sorted(timed_steps(settings), key=lambda step: (step[0], step[1], int(step[2]))):
        entry = measured.get(name_of("speed", shape, saving, length, backend))
        if entry is not None:
            memory = measured.get(name_of("memory", shape, saving, length), {})
            against = _against_rates(entry, rates, memory, peak_tflops)
            if gpu is not None and "error" not in entry:
                against["predicted_s"] = _predicted_s(settings, shape, saving, length, backend, gpu)
            speeds.append({"shape": shape, "saving": saving, "prefix_tokens": int(length), **against})
    cases, failed = summarized_rivals(settings, measured)
    return {
        "peak_tflops": peak_tflops,
        "rates": rates,
        "attention_backend": backend,
        "speed": speeds,
        "new_lengths": [
            {"shape": shape, "saving": saving, "longest_tokens": length, **measured[name]}
            for shape, saving, length in settings.new_lengths
            if (name := name_of("lengths", shape, saving, str(length), backend)) in measured
        ],
        "longest": [_fits(settings, shape, saving, measured) for shape, saving in settings.longest],
        "rivals": cases,
        "rivals_failed": failed,
    }


def known_gpu(device: str) -> GPU | None:
    """What the planner knows of a device, by the name that CUDA gives it."""
    return next((gpu for name, gpu in GPUS.items() if name.split("-")[0].upper() in device), None)


def _against_rates(
    entry: dict[str, Any], rates: dict[str, Any], memory: dict[str, Any], peak_tflops: float
) -> dict[str, Any]:
    if "error" in entry:
        return {name: entry[name] for name in ("error", "out_of_memory")}
    flops = entry["matmul_flops"] + entry["attention_flops"]
    found = {**entry, "mfu": flops / entry["step_s"] / peak_tflops / 1e12}
    if rates["both"] and rates["matmul"]:
        possible = entry["matmul_flops"] / rates["matmul"] + entry["attention_flops"] / rates["both"]
        found["time_over_possible"] = entry["step_s"] / (possible / 1e12)
    if "peak_memory_gib" in memory:
        found["memory_over_dry_run"] = entry["peak_memory_gib"] / memory["peak_memory_gib"]
    return found


def _predicted_s(settings: Settings, shape: str, saving: str, length: str, backend: str, gpu: GPU) -> float:
    from benchmarks.gpu.training import predicted_seconds

    case = dataclasses.replace(settings.shapes[shape], prefix_tokens=int(length))
    with tempfile.TemporaryDirectory(prefix="benchmark-gpu-") as folder:
        return predicted_seconds(case, settings.savings[saving], Path(folder), backend, gpu)


def _fits(settings: Settings, shape: str, saving: str, measured: Measured) -> dict[str, Any]:
    """The longest document that fitted and the shortest that did not."""
    ours = name_of("fits", shape, saving, "")
    tried = {int(key.removeprefix(ours).split()[0]): e for key, e in measured.items() if key.startswith(ours)}
    fits = [length for length, entry in tried.items() if "error" not in entry]
    fails = [length for length, entry in tried.items() if entry.get("out_of_memory")]
    return {
        "shape": shape,
        "saving": saving,
        "window_tokens": settings.window_tokens,
        "fits_tokens": max(fits, default=0),
        "fails_tokens": min(fails, default=None),
    }


def summarized_rivals(settings: Settings, measured: Measured) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The suite's summaries of every case with a measurement, and by variant or case what went wrong."""
    summaries, failed = [], {}
    for case in rival_cases(settings):
        runs: dict[str, list[Measurement]] = {}
        for variant in variants_of(case):
            entry = measured.get(name_of(*rival_name(case, variant)), {})
            if "error" in entry:
                failed[variant] = f"P {case.prefix_tokens}: {entry['error']}"
            elif entry:
                names = {field.name for field in dataclasses.fields(Measurement)}
                runs[variant] = [Measurement(**{key: value for key, value in entry.items() if key in names})]
        if not runs:
            continue
        try:
            summaries.append(summarize(case, runs, by_cpu_time=False))
        except ValueError as error:
            failed[f"P {case.prefix_tokens}, R {case.response_tokens}, n {case.turns}"] = str(error)
    return summaries, failed


def table(around: dict[str, Any], found: dict[str, Any]) -> str:
    """Speed and memory of every step, as a table for the docs."""
    lines = [
        "| shape | saves memory by | document | tokens/s | MFU | time over what the rates allow | over the plan's | "
        "peak GiB | over the dry run's | pinned GiB |",
        "| --- | --- | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for entry in found["speed"]:
        what = f"| {entry['shape']} | {entry['saving']} | {entry['prefix_tokens']:,} |"
        if "error" in entry:
            lines.append(f"{what} {'does not fit' if entry['out_of_memory'] else 'failed'} | | | | | | |")
            continue
        possible = _times(entry.get("time_over_possible"))
        planned = _times(entry["step_s"] / entry["predicted_s"] if "predicted_s" in entry else None)
        dry_run = _times(entry.get("memory_over_dry_run"))
        lines.append(
            f"{what} {entry['tokens_per_s']:,.0f} | {entry['mfu']:.1%} | {possible} | {planned} | "
            f"{entry['peak_memory_gib']:.1f} | {dry_run} | {entry['pinned_memory_gib']:.1f} |"
        )
    for entry in found["new_lengths"]:
        if "error" not in entry:
            lines += [
                "",
                f"{len(entry['prefix_tokens'])} documents of {min(entry['prefix_tokens']):,} to "
                f"{max(entry['prefix_tokens']):,} tokens, {entry['shape']} with {entry['saving']}: the first time each "
                f"took {entry['new_over_seen']:.2f}x as long as the second.",
            ]
    for bounds in found["longest"]:
        fails = f", {bounds['fails_tokens']:,} do not" if bounds["fails_tokens"] else ""
        lines += [
            "",
            f"Longest document of {bounds['shape']} with {bounds['saving']} and `--window-size "
            f"{bounds['window_tokens']},0`: {bounds['fits_tokens']:,} tokens fit{fails}.",
        ]
    rates = ", ".join(
        f"{name} {rate:.0f} TFLOP/s"
        for name, rate in (("matrix products", found["rates"]["matmul"]), ("attention", found["rates"]["both"]))
        if rate
    )
    lines += [
        "",
        f"Attention: `--attention-backend {found['attention_backend']}`, the fastest that was exact."
        + (f" Rates: {rates}." if rates else ""),
    ]
    versions = ", ".join(f"{name} {number}" for name, number in around["versions"].items() if number)
    device = ", ".join(
        f"{name.replace('_', ' ')} {value}" for name, value in around["device"].items() if name != "name"
    )
    lines += ["", f"{around['device']['name']}{', ' if device else ''}{device}; {versions}; commit {around['commit']}."]
    return "\n".join(lines)


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"
