"""Requests that can never be answered, on their way through datatrove, which knows one kind of error for all."""

from __future__ import annotations

import re

from datatrove.pipeline.inference.types import InferenceError

from megatron_longpo.generation.engine import DocumentError

# datatrove keeps an error like an answer, for the next run, only if its text has this word.
_MARK = "BadRequestError"


def refusal(reason: str, message: str) -> InferenceError:
    """What an engine raises for a request that can never be answered.

    Args:
        reason: For the statistics, a word such as ``context_length``.
        message: For the log.
    """
    return InferenceError(None, f"{_MARK}({reason}): {message}")


def document_error(error: InferenceError) -> DocumentError | None:
    """The error behind what `refusal` made, also after a way through the cache; None for every other error."""
    match = re.search(rf"{_MARK}\((\w+)\): (.*)", str(error.error), re.DOTALL)
    return DocumentError(match[1], match[2]) if match else None
