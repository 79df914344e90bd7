"""The files behind the paths that are inspected: pairs files, folders of them, and output folders of generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_longpo.generation.report import REPORT
from megatron_longpo.pair_formats.raw import input_files

PAIRS_NAME = "pairs.jsonl"


@dataclass(frozen=True)
class Sources:
    """What is read.

    Args:
        pairs: Files of pairs.
        reports: Reports of the generations that wrote some of them.
    """

    pairs: tuple[Path, ...]
    reports: tuple[Path, ...]


def find_sources(paths: Sequence[str | Path]) -> Sources:
    """The files behind some paths.

    Raises:
        ValueError: A path does not exist, is empty, or holds no pairs (yet).
    """
    pairs: list[Path] = []
    reports: list[Path] = []
    for path in map(Path, paths):
        folder = path if path.is_dir() else path.parent
        is_generated = (folder / REPORT).is_file() and (path.is_dir() or path.name == PAIRS_NAME)
        if path.is_dir() and is_generated and not (path / PAIRS_NAME).is_file():
            raise ValueError(
                f"{path} has {REPORT} and no {PAIRS_NAME}: run tools/generate_pairs.py again, it goes on where it "
                f"stopped"
            )
        # Beside the pairs of a generation lie its intermediate results, which are JSON lines too.
        pairs += [path / PAIRS_NAME] if path.is_dir() and (path / PAIRS_NAME).is_file() else input_files([path])
        if is_generated:
            reports.append(folder / REPORT)
    # `out out/pairs.jsonl`, say: a file is read once, however often it is named.
    files = {file.resolve(): file for file in reversed(input_files(pairs))}
    return Sources(tuple(reversed(files.values())), tuple({file.resolve(): file for file in reports}.values()))
