"""How long a text is: in characters, in words, and in tokens where there is a tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_longpo.data.chat_tokenizer import ChatTokenizer
from megatron_longpo.inspection.words import num_words


@dataclass(frozen=True)
class Length:
    """A length in every unit that is known."""

    characters: int | None = None
    words: int | None = None
    tokens: int | None = None

    def __str__(self) -> str:
        return " · ".join(f"{count:,} {unit.removesuffix('s') if count == 1 else unit}" for unit, count in self.items())

    def items(self) -> list[tuple[str, int]]:
        """The units and counts that are known."""
        units = (("characters", self.characters), ("words", self.words), ("tokens", self.tokens))
        return [(unit, count) for unit, count in units if count is not None]


class Ruler:
    """Measures texts.

    Args:
        tokenizer: Counts tokens; without one they are not counted.
    """

    def __init__(self, tokenizer: ChatTokenizer | None = None) -> None:
        self.tokenizer = tokenizer

    def __call__(self, text: str, with_words: bool = True) -> Length:
        """A text's length; the words of a whole document are rarely worth the time."""
        num_tokens = len(self.tokenizer.encode(text)[0]) if self.tokenizer else None
        return Length(len(text), num_words(text) if with_words else None, num_tokens)
