"""From measurements to ratios: what is compared with what, as JSON, as a table, as a section of the docs."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.circumstances import circumstances as where_and_with_what
from benchmarks.step import lm_head
from benchmarks.step.case import StepCase
from benchmarks.step.measure import Measurement
from megatron_longpo.files import atomic_writer

ROOT = Path(__file__).parents[2]
# What else is on the path stays there: packages may have been unpacked beside the interpreter's own.
PYTHONPATH = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
"""For processes that run this package."""
COMPARISONS = {
    "two_sequences": "shared_prefix",
    "two_sequences_full_logits": "shared_prefix",
    "trl": "shared_prefix_dpo",
}
"""Each opponent, and which of our variants it is compared with: the one of the same loss."""
LM_HEAD_KEY = "lm_head_gib_above_weights"
TARGETS = {
    "speedup_vs_two_sequences": (1.8, None),
    "memory_ratio_vs_two_sequences": (None, 0.65),
    LM_HEAD_KEY: (None, 1e9 / 2**30),
}
"""At least, at most; for the default sizes on a CPU."""
_TITLES = {
    "two_sequences": "shared prefix against two sequences",
    "two_sequences_full_logits": "shared prefix against two sequences with full logits",
    "trl": "preference loss alone: shared prefix against TRL's DPOTrainer",
}


def summarize(case: StepCase, measured: Mapping[str, Sequence[Measurement]], by_cpu_time: bool) -> dict[str, Any]:
    """Times, peaks and ratios of one case.

    Args:
        case: What was computed.
        measured: By variant, one measurement per process.
        by_cpu_time: Compare CPU time instead of wall-clock time.

    Raises:
        ValueError: Variants that must compute the same loss do not.
    """
    variants = {name: _variant(case, runs, by_cpu_time) for name, runs in measured.items()}
    ratios: dict[str, float] = {}
    for theirs, ours in COMPARISONS.items():
        if theirs not in variants or ours not in variants:
            continue
        _require_equal_losses(case, ours, variants[ours]["loss"], theirs, variants[theirs]["loss"])
        ratios[f"speedup_vs_{theirs}"] = variants[theirs]["step_s"] / variants[ours]["step_s"]
        ratios[f"wall_clock_speedup_vs_{theirs}"] = variants[theirs]["wall_s"] / variants[ours]["wall_s"]
        ratios[f"memory_ratio_vs_{theirs}"] = variants[ours]["peak_gib"] / variants[theirs]["peak_gib"]
    if "lm_head" in variants:
        ratios[LM_HEAD_KEY] = variants.pop("lm_head")["peak_gib"] - lm_head.weights_gib(case)
    return {**ratios, "case": asdict(case), "variants": variants}


def _variant(case: StepCase, runs: Sequence[Measurement], by_cpu_time: bool) -> dict[str, float]:
    """The least disturbed step, warm-ups included, since others only add time; of memory the smallest peak."""
    wall = min(second for run in runs for second in run.wall_s)
    cpu = min(second for run in runs for second in run.cpu_s)
    step = cpu if by_cpu_time else wall
    return {
        "loss": runs[0].losses[0],
        "step_s": step,
        "wall_s": wall,
        "cpu_s": cpu,
        "tokens_per_s": case.pair_tokens / step,
        "peak_gib": min(run.peak_gib for run in runs),
    }


def _require_equal_losses(case: StepCase, ours: str, our_loss: float, theirs: str, their_loss: float) -> None:
    if abs(our_loss - their_loss) > (3e-2 if case.bf16 else 1e-4) * abs(their_loss):
        raise ValueError(
            f"{ours} has loss {our_loss} and {theirs} has {their_loss}: they do not compute the same, so their times "
            "do not compare"
        )


def circumstances(threads: int, by_cpu_time: bool) -> dict[str, Any]:
    """Where and with what, so that a stored result can be judged later."""
    around = where_and_with_what(("torch", "megatron-core", "transformers", "trl"))
    return {
        **around,
        "machine": f"{around['machine']['cores']}-core {around['machine']['processor']} machine",
        "threads": threads,
        "time": "CPU time of the process" if by_cpu_time else "wall clock",
    }


def table(summary: Mapping[str, Any]) -> str:
    """One case for people."""
    case = StepCase(**summary["case"])
    lines = [
        _describe(case),
        f"{'':28}{'loss':>9}{'s/step':>9}{'wall s':>9}{'tokens/s':>10}{'peak GiB':>10}",
    ]
    lines += [
        f"{name:28}{v['loss']:9.4f}{v['step_s']:9.2f}{v['wall_s']:9.2f}{v['tokens_per_s']:10,.0f}{v['peak_gib']:10.3f}"
        for name, v in summary["variants"].items()
    ]
    for theirs, title in _TITLES.items():
        if f"speedup_vs_{theirs}" in summary:
            speedup, memory = f"speedup_vs_{theirs}", f"memory_ratio_vs_{theirs}"
            lines.append(
                f"{title}: {summary[speedup]:.2f}x faster{_verdict(case, summary, speedup)}, "
                f"{summary[memory]:.2f}x the peak memory{_verdict(case, summary, memory)}"
            )
    if LM_HEAD_KEY in summary:
        lines.append(
            f"LM head, {lm_head.NUM_TOKENS:,} tokens x {lm_head.VOCAB_SIZE:,} vocabulary: "
            f"{summary[LM_HEAD_KEY]:.2f} GiB above the weights{_verdict(case, summary, LM_HEAD_KEY)}"
        )
    return "\n".join(lines)


def _describe(case: StepCase) -> str:
    turns = f", {case.turns} turns" if case.turns > 1 else ""
    return f"P {case.prefix_tokens:,}, R {case.response_tokens}{turns}, {_describe_model(case)}"


def _describe_model(case: StepCase) -> str:
    return (
        f"{case.num_layers} layers, hidden {case.hidden_size}, MLP {case.ffn_hidden_size}, "
        f"heads {case.num_attention_heads}/{case.num_query_groups}, "
        f"vocabulary {case.vocab_size:,}, {'bf16' if case.bf16 else 'fp32'}, {case.device}"
    )


def _verdict(case: StepCase, summary: Mapping[str, Any], key: str) -> str:
    if key not in TARGETS or case != StepCase():
        return ""
    least, most = TARGETS[key]
    met = (least is None or summary[key] >= least) and (most is None or summary[key] <= most)
    limit = f"at least {least:g}" if least is not None else f"at most {most:.2g}"
    return f" (target {limit}: {'met' if met else 'MISSED'})"


def markdown(summaries: Sequence[Mapping[str, Any]], around: Mapping[str, Any], machine: str) -> str:
    """The ratios of several cases as a table for the docs: ratios carry over to other machines, seconds do not."""
    lines = ["| | P | R | n | times faster | peak memory |", "| --- | --: | --: | --: | --: | --: |"]
    for theirs, title in _TITLES.items():
        lines += [
            f"| {title} | {s['case']['prefix_tokens']:,} | {s['case']['response_tokens']} | {s['case']['turns']} | "
            f"{s[f'speedup_vs_{theirs}']:.2f} | "
            f"{s[f'memory_ratio_vs_{theirs}']:.2f}x |"
            for s in summaries
            if f"speedup_vs_{theirs}" in s
        ]
    heads = [s[LM_HEAD_KEY] for s in summaries if LM_HEAD_KEY in s]
    if heads:
        lines += ["", f"LM head, {lm_head.NUM_TOKENS:,} tokens x {lm_head.VOCAB_SIZE:,} vocabulary in one row: peak "]
        lines[-1] += f"{heads[-1]:.2f} GiB above the weights (its logits alone would take {_logits_gib():.0f} GiB)."
    versions = ", ".join(f"{name} {number}" for name, number in around["versions"].items() if number)
    case = StepCase(**summaries[-1]["case"])
    lines += [
        "",
        f"{machine}, {around['threads']} thread{'s' if around['threads'] > 1 else ''}, {around['time']}; "
        f"{_describe_model(case)}; {versions}; commit {around['commit']}.",
    ]
    return "\n".join(lines)


def _logits_gib() -> float:
    return lm_head.NUM_TOKENS * lm_head.VOCAB_SIZE * 4 / 2**30


def replace_section(path: Path, device: str, text: str, benchmark: str = "benchmark_step") -> None:
    """Put a text between the two markers of a benchmark and a device in a Markdown file.

    Raises:
        ValueError: The file has no such markers.
    """
    begin, end = f"<!-- {benchmark} {device} -->", f"<!-- end of {benchmark} {device} -->"
    page = path.read_text(encoding="utf-8")
    found = re.search(f"{re.escape(begin)}.*?{re.escape(end)}", page, re.DOTALL)
    if found is None:
        raise ValueError(f"--docs {path} has no lines {begin!r} and {end!r}: add them where the table belongs")
    with atomic_writer(path) as file:
        file.write(f"{page[: found.start()]}{begin}\n{text}\n{end}{page[found.end() :]}")
