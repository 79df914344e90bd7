"""What the rest of the project needs from a tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_longpo.data.document import Tokens

ChatMessage = Mapping[str, str]
"""``{"role": …, "content": …}``."""

Offsets = NDArray[np.int64]


class ChatTokenizer(Protocol):
    """What the rest of the project needs from a tokenizer."""

    path: str
    template: str
    vocab_size: int
    eos_id: int
    pad_id: int
    symbol_ids: frozenset[int]
    """Tokens that are one symbol of the template each, ``<s>`` say; the text between two of them is encoded alone."""

    @property
    def hash(self) -> str:
        """SHA-256 of everything that decides the tokens of a text."""

    @property
    def template_hash(self) -> str:
        """SHA-256 of the chat template."""

    def render(self, messages: Sequence[ChatMessage], add_generation_prompt: bool = False, **variables: object) -> str:
        """The text of a conversation, special tokens spelled out; ``variables`` are for templates that ask for them."""

    def encode(self, text: str) -> tuple[Tokens, Offsets, Offsets]:
        """Token ids int32 ``[T]`` of a rendered text, and the characters ``[start, end)`` of each, int64 ``[T]``.

        Nothing is added: special tokens come from the text alone.
        """

    def decode(self, tokens: Sequence[int] | Tokens, special: bool = True) -> str:
        """The text of tokens, special ones included where the tokenizer can show them and ``special`` asks for it."""


def as_arrays(ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> tuple[Tokens, Offsets, Offsets]:
    """What `ChatTokenizer.encode` returns, of ids and the places of their texts."""
    places = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    return np.array(ids, dtype=np.int32), places[:, 0], places[:, 1]


def first_id(*ids: int | None) -> int:
    """The first id that a tokenizer defines, or 0."""
    return next((token for token in ids if token is not None and token >= 0), 0)


def sha256(content: str | bytes) -> str:
    """Of a text as UTF-8 or of bytes, in hexadecimal digits."""
    return hashlib.sha256(content.encode("utf-8") if isinstance(content, str) else content).hexdigest()
