"""Plans as text: aligned columns, units in the heading."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_longpo.config import RunConfig
from megatron_longpo.data.rows import TrainingRow
from megatron_longpo.planning.dry_run import RankMemory
from megatron_longpo.planning.hardware import GPU, usable_gib
from megatron_longpo.planning.parts import Part
from megatron_longpo.planning.step_time import StepTime

if TYPE_CHECKING:
    from megatron_longpo.planning.search import Plan


WIDTH = 100
"""Columns of a terminal."""


def table(heading: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1, rules: Sequence[int] = ()) -> str:
    """Columns under their headings; the first ``left`` ones are aligned left, the others right.

    ``rules`` are the lines in front of which there is a rule, as there is under the heading.
    """
    widths = [max(len(row[column]) for row in (heading, *lines)) for column in range(len(heading))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    rule = "  ".join("─" * width for width in widths)
    text = [line(heading), rule]
    for number, cells in enumerate(lines):
        text += [rule, line(cells)] if number in rules else [line(cells)]
    return "\n".join(text)


def layout_text(config: RunConfig, num_gpus: int) -> str:
    """``TP 8 · PP 2 × 4 · CP 4 all_gather · DP 1``; × is the number of virtual stages."""
    parallel = config.parallel
    stages = f"PP {parallel.pipeline_model_parallel_size}"
    if config.num_virtual_stages is not None:
        stages += f" × {config.num_virtual_stages}"
    context = f"CP {parallel.context_parallel_size}"
    if parallel.context_parallel_size > 1:
        context += f" {parallel.cp_comm_type}"
    if parallel.hierarchical_context_parallel_sizes is not None:
        context += f" {'×'.join(map(str, parallel.hierarchical_context_parallel_sizes))}"
    return (
        f"TP {parallel.tensor_model_parallel_size} · {stages} · {context} · DP {parallel.data_parallel_size(num_gpus)}"
    )


def layout_line(config: RunConfig, num_gpus: int) -> str:
    """One line about a run's layout."""
    training = config.training
    recompute = training.recompute_granularity or "none"
    if recompute == "selective":
        recompute += f" ({' '.join(training.recompute_modules)})"
    if training.recompute_keep_attention:
        recompute += " but attention"
    for part, tokens in (("MLP", training.mlp_chunk_tokens), ("projections", training.projection_chunk_tokens)):
        if tokens is not None:
            recompute += f", {part} in pieces of {tokens} tokens"
    if training.cpu_offloading_num_layers:
        recompute += f", {training.cpu_offloading_num_layers} layers per stage offloaded"
    sharded = "sharded optimizer" if config.parallel.use_distributed_optimizer else "whole optimizer"
    if config.optimizer.optimizer_cpu_offload:
        sharded += " on the host"
    return (
        f"{num_gpus} GPUs: {layout_text(config, num_gpus)}, {sharded}, {config.num_microbatches(num_gpus)} "
        f"micro-batches, recompute {recompute}, {'bf16' if training.bf16 else 'fp32'}"
    )


def rows_line(rows: Sequence[TrainingRow], made_up: bool) -> str:
    """One line about the longest micro-batch."""
    row = rows[0]
    branches = " + ".join(f"{len(branch.tokens):,}" for branch in row.branches)
    count = f"{len(rows)} documents, longest " if len(rows) > 1 else ""
    source = "as long as --seq-length allows" if made_up else f"the dataset's longest, {row.id}"
    return f"row: {count}{len(row.prefix):,} shared + {branches} tokens ({source})"


def memory_table(stages: Sequence[RankMemory], gpu: GPU | None) -> str:
    """Peak memory per rank by part, host memory if some is used, and whether it fits."""
    names = ["at the peak"] if len(stages) == 1 else ["first stage", "last stage"]
    heading = ["GiB per rank", *(title for name in names for title in (name, "own peak"))]
    lines = [
        [str(part), *(_gib(count[part]) for stage in stages for count in (stage.parts, stage.own_peaks))]
        for part in Part
    ]
    lines.append(["total", *(cell for stage in stages for cell in (_gib(sum(stage.parts.values())), ""))])
    text = table(heading, lines, rules=(len(Part),))
    text += "\n(own peak: the most of a part at any time in the step; the column before it: when the total is highest)"
    if any(stage.host_gib for stage in stages):
        text += "\n\n" + _host_line(stages)
    if gpu is None:
        return text
    needed, usable = max(stage.gib for stage in stages), usable_gib(gpu)
    verdict, digits = ("fits", 1) if needed <= usable else ("does NOT fit", 2)  # 72.14 in 72.12 is not 72.1 in 72.1
    return (
        f"{text}\n\n{needed:.{digits}f} GiB {verdict} in {gpu.name}: {usable:.{digits}f} of {gpu.mem_gib:.1f} GiB are "
        "for tensors"
    )


def _host_line(stages: Sequence[RankMemory]) -> str:
    """Pinned memory of the fullest rank, which every rank of a node needs."""
    stage = max(stages, key=lambda stage: stage.host_gib)
    parts = ", ".join(f"{part} {_gib(num_bytes)}" for part, num_bytes in stage.host.items() if num_bytes)
    return f"host memory: {stage.host_gib:.2f} GiB per rank ({parts})"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f}" if num_bytes else "–"


def plans_table(plans: Sequence[Plan], num_gpus: int) -> str:
    """Of every layout, in the order of the search, a line of numbers and below it how it saves memory."""
    lines = [
        [
            str(number),
            layout_text(plan.candidate.config, num_gpus),
            f"{plan.time.seconds_per_document:.2f}",
            f"{plan.time.tokens_per_s_per_gpu:,.0f}",
            f"{100 * plan.time.mfu:.1f}",
            f"{plan.gib:.1f}",
        ]
        for number, plan in enumerate(plans, 1)
    ]
    heading = ["#", "layout", "s/document", "tokens/s/GPU", "MFU %", "peak GiB"]
    heading_line, rule, *rows = table(heading, lines, left=2).split("\n")
    text = [heading_line, rule]
    for row, plan in zip(rows, plans, strict=True):
        option, host = plan.candidate.option, f", {plan.host_gib:.1f} GiB" if plan.host_gib else ""
        saving = f"recomputed: {option.recomputed}; on the host: {option.on_host}{host}"
        # In columns of their own these would make the table wider than a terminal.
        text += [row, *textwrap.wrap(saving, WIDTH, initial_indent="   ", subsequent_indent="   ")]
    return "\n".join(text)


def time_table(time: StepTime) -> str:
    """Seconds of a step by part, and their shares."""
    lines = [
        [name, f"{seconds:.2f}", f"{100 * seconds / time.seconds:.1f}"]
        for name, seconds in time.parts.items()
        if seconds > 0
    ]
    return table(["part", "s", "%"], lines)


def time_line(time: StepTime) -> str:
    """A step's predicted time and rates, were all its documents this long."""
    return (
        f"predicted: {time.seconds:.1f} s per step of {time.documents} documents, {time.seconds_per_document:.2f} "
        f"s/document, {time.tokens_per_s_per_gpu:,.0f} tokens/s/GPU, MFU {100 * time.mfu:.1f} %"
    )


def cost_line(time: StepTime, num_documents: int) -> str:
    """What a whole run costs."""
    hours = time.gpu_hours(num_documents)
    days = hours / time.num_gpus / 24
    return (
        f"{num_documents:,} documents: {hours:,.0f} GPU-hours, {days:.1f} days on {time.num_gpus} GPUs "
        f"({time.tflops_per_gpu:.0f} TFLOP/s per GPU)"
    )
