"""What generation says of its own work: `report.json` beside the pairs that it wrote."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1
NAME = "report.json"


@dataclass
class GenerationReport:
    """Counts of one generation, or of several together.

    Args:
        documents_read: Documents that were looked at.
        documents_with_pairs: Documents that gave at least one pair.
        documents_dropped: Documents without pairs, by reason.
        turns_planned: Pairs that were asked for.
        turns_kept: Pairs that were kept.
        turns_dropped: The others, by reason.
        prompt_tokens: Tokens the model read.
        completion_tokens: Tokens the model wrote.
        seconds: Wall time.
    """

    documents_read: int = 0
    documents_with_pairs: int = 0
    documents_dropped: Counter[str] = field(default_factory=Counter)
    turns_planned: int = 0
    turns_kept: int = 0
    turns_dropped: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0


def read_reports(files: Sequence[Path]) -> GenerationReport | None:
    """The sum of all reports; None if there is none.

    Raises:
        ValueError: A file is no report of generation.
    """
    total = GenerationReport()
    for file in files:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(content, Mapping) or content.get("schema") != SCHEMA:
                raise ValueError(f"it has no 'schema': {SCHEMA}")
            _add(total, content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(
                f"{file}: is not what tools/generate_pairs.py writes ({reason}); move it to inspect the pairs alone"
            ) from error
    return total if files else None


def _add(total: GenerationReport, content: Mapping[str, Any]) -> None:
    documents, turns, tokens = content["documents"], content["turns"], content["tokens"]
    total.documents_read += int(documents["read"])
    total.documents_with_pairs += int(documents["with_pairs"])
    total.turns_planned += int(turns["planned"])
    total.turns_kept += int(turns["kept"])
    for counter, reasons in ((total.documents_dropped, documents), (total.turns_dropped, turns)):
        counter.update({str(reason): int(count) for reason, count in reasons["dropped"].items()})
    total.prompt_tokens += int(tokens["prompt"])
    total.completion_tokens += int(tokens["completion"])
    total.seconds += float(content["seconds"])


def in_words(reason: str) -> str:
    """A reason's name as it is read."""
    return reason.replace("_", " ")
