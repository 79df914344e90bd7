"""What tools/inspect_pairs.py does with its flags."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_longpo.data.tokenizer import TokenizerSpec
from megatron_longpo.files import atomic_writer, check_writable
from megatron_longpo.inspection.inspect import InspectOptions, inspect
from megatron_longpo.inspection.page import html_page
from megatron_longpo.inspection.pair_text import pair_lines
from megatron_longpo.inspection.report_text import report_lines
from megatron_longpo.inspection.source import find_sources
from megatron_longpo.inspection.terminal import Terminal


def run(arguments: argparse.Namespace, terminal_chars: int, html_chars: int) -> None:
    """Read the pairs, write the page if there is to be one, and print.

    Args:
        arguments: The command line.
        terminal_chars: Longest text to print in full.
        html_chars: Longest text to show in full on the page.
    """
    tokenizer = None
    if arguments.tokenizer_model is not None:
        tokenizer = TokenizerSpec(arguments.tokenizer_model, chat_template=arguments.chat_template)
    options = InspectOptions(
        paths=tuple(arguments.paths),
        num_pairs=arguments.num_pairs,
        document_id=arguments.id,
        seed=arguments.seed,
        tokenizer=tokenizer,
        needs_report=arguments.id is None or arguments.html is not None,
    )
    if arguments.html is not None:
        files = find_sources(options.paths).pairs
        if any(Path(arguments.html).exists() and file.samefile(arguments.html) for file in files):
            raise ValueError(f"--html {arguments.html} is one of the pairs files: give another name")
        check_writable(arguments.html, "--html", "report.html")
    inspection = inspect(options)
    # Before anything is printed: `head` may end the printing early.
    if arguments.html is not None:
        with atomic_writer(arguments.html) as file:
            file.write(html_page(inspection, html_chars))

    # What an old terminal cannot show must not stop the rest.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    terminal = Terminal.of(sys.stdout)
    for view in inspection.views:
        print("\n".join(pair_lines(view, terminal, terminal_chars)), end="\n\n")
    for line in report_lines(inspection, terminal):
        print(line)
    if arguments.html is not None:
        print(f"\nwritten: {arguments.html}")
