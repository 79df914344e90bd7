"""From nothing to two trained models, a picture and an answer, on real text that every Python carries:

    make quickstart          # or: .venv/bin/python -m examples.quickstart.run

Everything lands in runs/quickstart. A stage whose inputs have not changed is skipped; to start over, remove the folder.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

from megatron_longpo.help_format import HelpFormatter
from megatron_longpo.processes import take_sigterm_as_ctrl_c


def main() -> None:
    """Run the stages and print the summary."""
    argparse.ArgumentParser(
        prog="python -m examples.quickstart.run", description=__doc__, formatter_class=HelpFormatter
    ).parse_args()
    take_sigterm_as_ctrl_c()
    try:
        _run()
    except KeyboardInterrupt:
        print("\nquickstart: stopped; finished stages are kept, the same command goes on behind them", file=sys.stderr)
        sys.exit(130)


def _run() -> None:
    # Imported here: Ctrl-C ends plainly from now on.
    from transformers.utils import logging

    from examples.quickstart.job import ANSWER, EXPORTED, FOLDER, METRICS, REPORT, REPOSITORY, stages
    from examples.quickstart.stages import run_stages
    from megatron_longpo.report import summary_table

    started = time.monotonic()
    os.chdir(REPOSITORY)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    seconds = run_stages(stages(), FOLDER / "stamps")

    print("\nMean of the first 5 steps → mean of the last 5 steps; held-out documents: first → last evaluation\n")
    print(summary_table(METRICS))
    print("\nOpened with transformers from the exported folder:\n")
    print(ANSWER.read_text(encoding="utf-8"), end="")
    print("\n" + " · ".join(f"{name} {took:.0f} s" for name, took in seconds.items() if took >= 0.5))
    print(f"picture: {REPORT} · model: {EXPORTED} · {time.monotonic() - started:.0f} s in all")


if __name__ == "__main__":
    main()
