"""The benchmark suite: one step against its rivals over the length of the document, as ratios measured in one run.

    make bench         # python -m benchmarks.suite
    make bench-gpu     # python -m benchmarks.gpu: this suite on a GPU, and more

Every number is of a process of its own (`benchmarks.step`). A rerun replaces what the run before wrote:
benchmarks/results/step_DEVICE.json and .png, and the table in docs/benchmarks.md.

The matrix is documents of P = 1K … 16K tokens (on a GPU until memory runs out) with one turn and responses of R = 128
tokens against all rivals, and beside it n = 4 turns and R = 512 against two sequences on a middle length: there the
branches weigh most against the prefix without being most of the row.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.growth import draw_growth
from benchmarks.step.case import StepCase, write_files
from benchmarks.step.measure import Measurement
from benchmarks.step.run import RELATIVE_COST, available_variants, run_variant
from benchmarks.step.summary import ROOT, circumstances, markdown, replace_section, summarize, table
from megatron_longpo.files import atomic_writer
from megatron_longpo.help_format import HelpFormatter, at_least_1

RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs" / "benchmarks.md"
VARIANTS = ("shared_prefix", "two_sequences", "two_sequences_full_logits", "shared_prefix_dpo", "trl")
_MAIN_SHAPE = 1, 128
"""Turns and response tokens of the cases that all rivals run."""
_NUM_STEPS = 2
"""Of a process; the faster one counts."""


@dataclasses.dataclass(frozen=True)
class Matrix:
    """Which cases a device runs.

    Args:
        model: Everything of a case but its document.
        lengths: Prefix tokens of documents with one turn and responses of 128 tokens.
        more_lengths: Those with four turns, and with responses of 512 tokens; against two sequences only.
    """

    model: StepCase
    lengths: tuple[int, ...]
    more_lengths: tuple[int, ...]

    def cases(self) -> Iterator[StepCase]:
        """The cases, shortest first, so that a length that does not fit comes last."""
        for length in sorted({*self.lengths, *self.more_lengths}):
            if length in self.lengths:
                yield dataclasses.replace(self.model, prefix_tokens=length, response_tokens=128, turns=1)
            if length in self.more_lengths:
                yield dataclasses.replace(self.model, prefix_tokens=length, response_tokens=128, turns=4)
                yield dataclasses.replace(self.model, prefix_tokens=length, response_tokens=512, turns=1)


# The LM head's share of a step is then near that of a real model: 3 % of the FLOPs at P = 16K, 2 % in Mistral 7B.
CPU = Matrix(
    StepCase(
        num_layers=2,
        hidden_size=128,
        ffn_hidden_size=448,
        num_attention_heads=4,
        num_query_groups=1,
        vocab_size=1024,
    ),
    (1024, 2048, 4096, 8192, 16384),
    (4096,),
)
TINY = Matrix(
    StepCase(num_layers=1, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, vocab_size=64), (32, 64), (32,)
)


def run_suite(matrix: Matrix, num_threads: int, by_cpu_time: bool) -> dict[str, Any]:
    """Measure every case.

    Args:
        matrix: The cases.
        num_threads: Threads of each process.
        by_cpu_time: Compare CPU time instead of wall-clock time.
    """
    cases = list(matrix.cases())
    jobs = [(case, [name for name in available_variants(case) if name in variants_of(case)]) for case in cases]
    total = sum(_NUM_STEPS * RELATIVE_COST[name] * case.pair_tokens for case, names in jobs for name in names)
    summaries = []
    with tqdm(total=total, bar_format="{l_bar}{bar}| {elapsed} of about {remaining} more") as bar:
        for case, names in jobs:
            measured: dict[str, list[Measurement]] = {}
            with tempfile.TemporaryDirectory(prefix="benchmark-suite-") as folder:
                write_files(case, Path(folder))
                for name in names:
                    label = f"P {case.prefix_tokens}, R {case.response_tokens}, n {case.turns}: {name}"
                    bar.set_description(label)
                    cost = RELATIVE_COST[name] * case.pair_tokens
                    run = run_variant(
                        case,
                        name,
                        Path(folder),
                        _NUM_STEPS,
                        num_threads,
                        lambda cost=cost: bar.update(cost),  # type: ignore[misc]
                    )
                    measured[name] = [run]
            summaries.append(summarize(case, measured, by_cpu_time))
    return {**circumstances(num_threads, by_cpu_time), "cases": summaries}


def variants_of(case: StepCase) -> Sequence[str]:
    """What is measured of a case: the main row of the matrix against all rivals, others against two sequences."""
    return VARIANTS if (case.turns, case.response_tokens) == _MAIN_SHAPE else VARIANTS[:2]


def write_results(result: dict[str, Any], name: str, results: Path = RESULTS, docs: Path | None = DOCS) -> None:
    """Write JSON, picture (of several lengths) and the docs' table in place of those of the run before."""
    results.mkdir(parents=True, exist_ok=True)
    with atomic_writer(results / f"step_{name}.json") as file:
        file.write(json.dumps(result, indent=2) + "\n")
    if len({summary["case"]["prefix_tokens"] for summary in result["cases"]}) > 1:
        draw_growth(result["cases"], results / f"step_{name}.png")
    if docs is not None:
        replace_section(docs, name, markdown(result["cases"], result, result["machine"]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite that the command line asks for; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.suite",
        description=__doc__,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--tiny", action="store_true", help="seconds instead of minutes, to see that everything runs")
    parser.add_argument("--threads", type=at_least_1, default=1, metavar="N", help="threads of PyTorch")
    parser.add_argument("--max-prefix-tokens", type=at_least_1, metavar="N", help="leave longer documents out")
    parser.add_argument(
        "--results", type=Path, metavar="DIR", help="write there; without it, into benchmarks/results and the docs"
    )
    arguments = parser.parse_args(argv)
    matrix = TINY if arguments.tiny else CPU
    limit = arguments.max_prefix_tokens
    if limit is not None:
        shorter = [tuple(x for x in lengths if x <= limit) for lengths in (matrix.lengths, matrix.more_lengths)]
        matrix = dataclasses.replace(matrix, lengths=shorter[0], more_lengths=shorter[1])
    # With several threads CPU time would hide that some of them wait.
    result = run_suite(matrix, arguments.threads, by_cpu_time=arguments.threads == 1)
    for summary in result["cases"]:
        print(f"\n{table(summary)}")
    whole = not arguments.tiny and limit is None
    folder = arguments.results or (RESULTS if whole else None)
    if folder is None:
        print("\nnothing was written: this is not the whole suite; --results DIR writes it elsewhere")
        return 0
    write_results(result, "cpu", folder, DOCS if arguments.results is None else None)
    print(f"\nwrote {folder}/step_cpu.json and .png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
