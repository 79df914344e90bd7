"""What tools/inspect_pairs.py does with its flags."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_longpo.data.tokenizer import TokenizerSpec
from megatron_longpo.files import atomic_writer, temporary_name
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
        _check_writable(arguments.html, options.paths)
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


def _check_writable(html: str, paths: Sequence[str]) -> None:
    """Find out before hours of reading that a page cannot be written."""
    path = Path(html)
    if path.is_file() and any(path.samefile(file) for file in find_sources(paths).pairs):
        raise ValueError(f"--html {html} is one of the pairs files: give another name")
    if path.is_dir():
        raise ValueError(f"--html {html} is a folder: give a file's name, such as {path / 'report.html'}")
    probe = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            probe.touch()
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"--html {html} cannot be written: {error.strerror or error}") from error
