"""What the pipeline asks of an engine, and the errors by which an engine says what became of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Request:
    """One prompt.

    Args:
        prompt: The user's message.
        max_tokens: Longest reply.
        temperature: 0 is greedy.
        top_p: Nucleus of the sampling.
        seed: Of the sampling.
        whole_document: The prompt holds the whole document, not a chunk.
    """

    prompt: str
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    whole_document: bool = False


@dataclass(frozen=True)
class Answer:
    """What the model replied: text without special tokens, whether it was cut at ``max_tokens``, counts of tokens."""

    text: str
    cut_off: bool
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0


Ask = Callable[[Sequence[Request]], Awaitable[list[Answer]]]
"""Asks the requests of one document that belong together; answers come in the same order.

Raises:
    DocumentError: The document cannot be answered.
    EngineError: The engine cannot answer anything.
"""


class DocumentError(Exception):
    """This document cannot be answered; ``reason`` is a short word for the statistics."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class EngineError(RuntimeError):
    """The engine cannot answer anything: the run stops here, and goes on from here when it is started again."""
