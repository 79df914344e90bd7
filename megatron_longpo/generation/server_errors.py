"""What servers of OpenAI's chat protocol say when they do not answer."""

from __future__ import annotations

import email.utils
import re
import time
from collections.abc import Mapping

import orjson

API_KEY = "OPENAI_API_KEY"
"""The environment variable with the key; no flag takes it, and nothing that is written or printed has it."""

_LONGEST_RETRY_AFTER_S = 600.0
_SHOWN_CHARS = 300
_TOO_LONG = re.compile(
    r"context[ _-]?(?:length|window|size)|maximum (?:model|context|input)|too (?:long|many tokens)"
    r"|exceeds the maximum allowed length"  # SGLang
    r"|exceed max_(?:num_tokens|seq_len)"  # TensorRT-LLM
    r"|`inputs` (?:must have less than|tokens \+ `max_new_tokens` must be)",  # TGI
    re.IGNORECASE,
)


class AskAgain(Exception):
    """The same request may be answered later, after ``after_s`` seconds at the earliest."""

    def __init__(self, message: str, after_s: float = 0.0) -> None:
        super().__init__(message)
        self.after_s = after_s


def retry_after_s(headers: Mapping[str, str]) -> float:
    """The pause that a server asks for, in seconds: given as such or as a date (RFC 9110, 10.2.3)."""
    value = headers.get("Retry-After", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return 0.0
    return min(max(seconds, 0.0), _LONGEST_RETRY_AFTER_S)


def error_text(content: bytes) -> str:
    """What an error's body says, as one line that is not too long."""
    text, _ = _text_and_kind(content)
    return text[:_SHOWN_CHARS]


def is_too_long(content: bytes) -> bool:
    """Whether an error's body says that the prompt is longer than what the server reads."""
    return any(_TOO_LONG.search(part) for part in _text_and_kind(content))


def _text_and_kind(content: bytes) -> tuple[str, str]:
    """The message of an error's body, and what programs are told: llama.cpp's type, OpenAI's code."""
    text, kind = None, ""
    try:
        reply = orjson.loads(content)
        error = reply.get("error", reply)
        if isinstance(error, dict):
            text = error.get("message") or error.get("detail")
            kind = f"{error.get('type')} {error.get('code')}"
        else:
            text = error
    except (orjson.JSONDecodeError, AttributeError):
        pass
    text = str(text) if text else content.decode("utf-8", "replace")
    return " ".join(text.split()), kind


def advice(status: int) -> str:
    """Which flag or variable to look at, for the end of a message."""
    if status in (401, 403):
        return f"; set the environment variable {API_KEY}"
    if status == 404:
        return "; --base-url must end where /chat/completions follows, mostly in /v1, and --model be served there"
    return ""
