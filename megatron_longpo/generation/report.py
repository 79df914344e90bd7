"""What the making of pairs says of its own work: `report.json` beside the pairs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_longpo.generation.rollout import Outcome
from megatron_longpo.pair_formats.raw import GENERATION_REPORT

SCHEMA = 1
REPORT = GENERATION_REPORT


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
        seconds: Summed over documents, which overlap in time.
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

    def add(self, outcome: Outcome, seconds: float) -> None:
        """Count a document."""
        self.documents_read += 1
        self.documents_with_pairs += bool(outcome.turns)
        if outcome.dropped:
            self.documents_dropped[outcome.dropped] += 1
        self.turns_planned += outcome.num_planned
        self.turns_kept += len(outcome.turns)
        self.turns_dropped += outcome.dropped_turns
        self.prompt_tokens += outcome.prompt_tokens
        self.completion_tokens += outcome.completion_tokens
        self.seconds += seconds

    def to_dict(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The content of report.json, with the settings that decided the content of the pairs."""
        return {
            "schema": SCHEMA,
            "settings": dict(settings),
            "documents": {
                "read": self.documents_read,
                "with_pairs": self.documents_with_pairs,
                "dropped": dict(self.documents_dropped.most_common()),
            },
            "turns": {
                "planned": self.turns_planned,
                "kept": self.turns_kept,
                "dropped": dict(self.turns_dropped.most_common()),
            },
            "tokens": {"prompt": self.prompt_tokens, "completion": self.completion_tokens},
            "seconds": round(self.seconds, 3),
        }

    def table(self) -> str:
        """For the terminal."""
        rows: list[tuple[str, int]] = [
            ("documents read", self.documents_read),
            ("documents with pairs", self.documents_with_pairs),
            *((f"  dropped: {in_words(name)}", count) for name, count in self.documents_dropped.most_common()),
            ("turns tried", self.turns_planned),
            ("turns kept", self.turns_kept),
            *((f"  dropped: {in_words(name)}", count) for name, count in self.turns_dropped.most_common()),
            ("tokens of prompts", self.prompt_tokens),
            ("tokens of answers", self.completion_tokens),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value:>16,}" for name, value in rows)


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
