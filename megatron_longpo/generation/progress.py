"""The progress bar: documents, pairs, tokens per second, what was dropped and why, time left."""

from __future__ import annotations

import sys
import time
from collections import Counter

from tqdm import tqdm

from megatron_longpo.generation.corpus import count_documents
from megatron_longpo.generation.report import in_words
from megatron_longpo.generation.rollout import Outcome
from megatron_longpo.generation.settings import GenerationSettings

_MOST_REASONS = 3


class Progress:
    """Shows the progress of a task while the block runs.

    Args:
        settings: Of the run.
        task: Its number.
    """

    def __init__(self, settings: GenerationSettings, task: int) -> None:
        total = count_documents(settings)
        if total is not None:
            total = len(range(task, total, settings.num_tasks))
        title = "pairs" if settings.num_tasks == 1 else f"pairs {task}/{settings.num_tasks}"
        self._bar = tqdm(
            total=total,
            desc=title,
            unit="document",
            disable=not settings.progress,
            # A log file gets a line now and then instead of a bar.
            mininterval=0.5 if sys.stderr.isatty() else 30.0,
            dynamic_ncols=True,
            smoothing=0.05,
        )
        self._started = time.monotonic()
        self._pairs = 0
        self._tokens = 0
        self._dropped: Counter[str] = Counter()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def was_finished(self) -> None:
        """A document was finished by an earlier run."""
        if not self._bar.disable:
            # Not work of this run, so that it does not make the time left look short.
            self._bar.initial += 1
            self._bar.update()

    def finished(self, outcome: Outcome) -> None:
        """A document is finished."""
        self._pairs += len(outcome.turns)
        self._tokens += outcome.prompt_tokens + outcome.completion_tokens
        if not outcome.num_planned:
            self._dropped[outcome.dropped] += 1
        self._dropped += outcome.dropped_turns
        per_second = self._tokens / max(time.monotonic() - self._started, 1e-9)
        shown = {"pairs": f"{self._pairs:,}", "tokens/s": f"{per_second:,.0f}"}
        if self._dropped:
            most = self._dropped.most_common(_MOST_REASONS)
            reasons = ", ".join(f"{count} {in_words(reason)}" for reason, count in most)
            more = ", …" if len(self._dropped) > _MOST_REASONS else ""
            shown["dropped"] = f"{self._dropped.total():,} ({reasons}{more})"
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()
