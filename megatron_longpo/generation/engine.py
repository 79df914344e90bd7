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
        text_tokens: Tokens of the document or chunk in the prompt: a server must have read as many at least.
    """

    prompt: str
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    whole_document: bool = False
    text_tokens: int = 0


@dataclass(frozen=True)
class Answer:
    """What the model replied.

    Args:
        text: Without special tokens.
        cut_off: It was cut at ``max_tokens``.
        num_prompt_tokens, num_completion_tokens: As the engine counts them.
        broken_off: Why the engine ended it before the model did, ``content_filter`` say; empty where it did not.
    """

    text: str
    cut_off: bool
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    broken_off: str = ""


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


def holds_thoughts(reply: str, prompt: str) -> bool:
    """Whether a reply has a model's thoughts in it; a reply may quote the tag that ends them from its prompt."""
    return reply.lstrip().startswith("<think>") or ("</think>" in reply and "</think>" not in prompt)
