"""The files behind the paths that are inspected: pairs files, folders of them, and output folders of generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_longpo.pair_formats.raw import GENERATED_PAIRS, GENERATION_REPORT, input_files


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
        is_generated = (folder / GENERATION_REPORT).is_file() and (path.is_dir() or path.name == GENERATED_PAIRS)
        if path.is_dir() and is_generated and not (path / GENERATED_PAIRS).is_file():
            raise ValueError(
                f"{path} has {GENERATION_REPORT} and no {GENERATED_PAIRS}: run tools/generate_pairs.py again, it goes "
                "on where it stopped"
            )
        pairs += input_files([path])
        if is_generated:
            reports.append(folder / GENERATION_REPORT)
    # `out out/pairs.jsonl`, say: a file is read once, however often it is named.
    files = {file.resolve(): file for file in reversed(input_files(pairs))}
    return Sources(tuple(reversed(files.values())), tuple({file.resolve(): file for file in reports}.values()))
