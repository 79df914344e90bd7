"""Show pairs side by side, and statistics over all of them:

    python tools/inspect_pairs.py pairs.jsonl
    python tools/inspect_pairs.py pairs/ --num-pairs 20 --html report.html
    python tools/inspect_pairs.py pairs.jsonl --id doc-17

PATH is a pairs file of any format, a folder of them, or an output folder of generation. docs/pairs-tools.md has more.
"""

from __future__ import annotations

import argparse
import os
import sys

from megatron_longpo.help_format import HelpFormatter
from megatron_longpo.processes import take_sigterm_as_ctrl_c

NUM_PAIRS, TERMINAL_CHARS, HTML_CHARS = 5, 800, 20_000


def main() -> None:
    """Parse the command line, read, write the page, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add(
        "paths",
        nargs="+",
        metavar="PATH",
        help="pairs: .jsonl, .json, .parquet, .arrow, folders, or generation's output",
    )
    add(
        "--num-pairs",
        type=int,
        metavar="N",
        help=f"pairs to show, drawn from all (default: {NUM_PAIRS}; 0: report only)",
    )
    add("--id", help="show all pairs of this document instead; without --html, no report is made")
    add("--seed", type=int, metavar="N", help="another seed draws other pairs (default: 0)")
    add("--html", metavar="FILE", help="also write pairs and report as one HTML page")
    add("--tokenizer-model", metavar="DIR_OR_MODEL", help="counts tokens too, and shows tokenized rows as text")
    add("--chat-template", metavar="FILE", help="Jinja chat template (default: the tokenizer's own)")
    add(
        "--max-chars",
        type=int,
        metavar="N",
        help=f"longest text to show in full (default: {TERMINAL_CHARS} in the terminal, {HTML_CHARS} on the page)",
    )
    arguments = parser.parse_args()
    if arguments.max_chars is not None and arguments.max_chars < 1:
        parser.error(f"--max-chars {arguments.max_chars} must be at least 1")
    for flag, value in (("--num-pairs", arguments.num_pairs), ("--seed", arguments.seed)):
        if arguments.id is not None and value is not None:
            parser.error(f"{flag} {value} has no effect with --id, which shows all pairs of a document: leave it out")
    arguments.num_pairs = NUM_PAIRS if arguments.num_pairs is None else arguments.num_pairs
    arguments.seed = arguments.seed or 0
    if arguments.chat_template and not arguments.tokenizer_model:
        parser.error("--chat-template has no effect without --tokenizer-model: give that too")

    take_sigterm_as_ctrl_c()
    try:
        # Imported here: `--help` and mistakes in flags do not wait for numpy, and Ctrl-C meanwhile ends plainly.
        from megatron_longpo.inspection.command import run

        run(arguments, arguments.max_chars or TERMINAL_CHARS, arguments.max_chars or HTML_CHARS)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        sys.exit(f"inspect_pairs.py: error: {str(error).removeprefix('--input ')}")
    except KeyboardInterrupt:
        print("inspect_pairs.py: stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
