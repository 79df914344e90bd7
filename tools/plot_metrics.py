"""Draw the metrics of one or more runs and print their first and last values:

    python tools/plot_metrics.py "TP 2=runs/a/metrics.jsonl" \\
        "CP 2=runs/b/metrics.jsonl" --output report.png

A file is what `pretrain_longpo.py --metrics-jsonl FILE` wrote; a run without a name goes by its file's name.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_longpo.help_format import HelpFormatter
from megatron_longpo.processes import plain_ending


def main() -> None:
    """Parse the command line, draw, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument(
        "runs", nargs="+", metavar="NAME=FILE", help="metrics file, with the run's name before it or without"
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="picture to write: .png, .pdf or .svg")
    parser.add_argument("--title", default="Training", help="headline")
    arguments = parser.parse_args()
    runs: dict[str, str] = {}
    for run in arguments.runs:
        # A file that is there is meant as it stands: folders are named lr=1e-6.
        name, file = (run, run) if "=" not in run or Path(run).exists() else run.split("=", 1)
        if not (name and file):
            parser.error(f"{run!r} must be NAME=FILE, or a file alone")
        if name in runs:
            parser.error(f"the name {name!r} occurs twice: give every run its own, NAME=FILE")
        runs[name] = file
    with plain_ending("plot_metrics.py", arguments.output):
        # Imported here: Ctrl-C ends plainly from now on.
        from megatron_longpo.report import plot_runs, summary_table

        plot_runs(runs, arguments.output, arguments.title)
        print(summary_table(runs))


if __name__ == "__main__":
    main()
