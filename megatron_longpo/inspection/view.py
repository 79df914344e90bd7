"""One pair as it is shown: what is worth seeing of a document and one of its turns, without the document itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_longpo.data.tokenize import PromptTemplate
from megatron_longpo.import_pairs.tokenized import NotConvertible, TokenizedConverter
from megatron_longpo.inspection.lengths import Length, Ruler
from megatron_longpo.inspection.words import similarity, words
from megatron_longpo.pair_formats.document import Message, PairsRow, PreferenceDocument, TokenizedPair, TokenSequence

PROMPT_END_CHARS = 600
"""How much of a prompt is shown where the instruction is somewhere at its end."""


@dataclass(frozen=True)
class Text:
    """A text and its length; the text is None where only tokens are known."""

    text: str | None
    length: Length


@dataclass(frozen=True)
class PairView:
    """One turn of one document.

    Args:
        id: The document's id.
        turn: Number of the turn, from 1.
        num_turns: Turns of the document.
        location: File and line.
        document: Its length; the text is left out.
        chunk: C_S; None where the row has no short prompt.
        chunk_share: Where the chunk begins and ends in the document, from 0 to 1; None if that is not known.
        instruction: I, or the end of the long prompt where that is not known.
        has_instruction: Whether ``instruction`` is one.
        chosen: The answer from the short prompt.
        rejected: The answer from the long prompt.
        similarity: Of the answers, by words or tokens.
        context: Messages before the prompt.
        whole_prompts: ``document`` and ``chunk`` are whole prompts, instructions and markers included.
        note: Anything the reader must know, or nothing.
    """

    id: str
    turn: int
    num_turns: int
    location: str
    document: Text
    chunk: Text | None
    chunk_share: tuple[float, float] | None
    instruction: Text
    has_instruction: bool
    chosen: Text
    rejected: Text
    similarity: float
    context: tuple[Message, ...] = ()
    whole_prompts: bool = False
    note: str = ""


class Viewer:
    """Makes views of rows.

    Args:
        ruler: Measures texts, and its tokenizer, if it has one, decodes tokenized rows.
    """

    def __init__(self, ruler: Ruler) -> None:
        self._ruler = ruler
        self._convert = TokenizedConverter(ruler.tokenizer, PromptTemplate()) if ruler.tokenizer else None

    def views(self, row: PairsRow) -> list[Callable[[], PairView]]:
        """One maker of a view for each turn of a row; few of them are ever called."""
        if isinstance(row, PreferenceDocument):
            return [self._maker(row, turn) for turn in range(len(row.turns))]
        return [self._tokens_maker(row, turn) for turn in range(len(row.chosen.responses()))]

    def _maker(self, row: PreferenceDocument, turn: int) -> Callable[[], PairView]:
        return lambda: self._text_view(row, turn)

    def _tokens_maker(self, row: TokenizedPair, turn: int) -> Callable[[], PairView]:
        return lambda: self._tokens_view(row, turn)

    def _text_view(self, row: PreferenceDocument, number: int) -> PairView:
        turn = row.turns[number]
        span, num_chars = turn.chunk_span, len(row.document)
        instruction = turn.instruction or row.document[-PROMPT_END_CHARS:]
        return PairView(
            id=row.id,
            turn=number + 1,
            num_turns=len(row.turns),
            location=str(row.location or ""),
            document=Text(None, self._ruler(row.document, with_words=False)),
            chunk=self._text(turn.chunk) if turn.chunk is not None else None,
            chunk_share=(span[0] / num_chars, span[1] / num_chars) if span else None,
            instruction=self._text(instruction),
            has_instruction=bool(turn.instruction),
            chosen=self._text(turn.chosen),
            rejected=self._text(turn.rejected),
            similarity=similarity(words(turn.chosen), words(turn.rejected)),
            context=row.long_context,
            whole_prompts=not row.turns[0].instruction,
        )

    def _tokens_view(self, row: TokenizedPair, number: int) -> PairView:
        note = "Only tokens are known; --tokenizer-model DIR shows them as text."
        if self._convert is not None:
            try:
                return self._text_view(self._convert(row).document, number)
            except NotConvertible as error:
                note = f"Decoded as it is, not taken apart: {error}."
        starts_and_ends = row.chosen.responses(), row.rejected.responses()
        (start, _), before = starts_and_ends[0][number], starts_and_ends[0][number - 1][1] if number else 0
        chunk = row.short_chosen[number] if row.short_chosen else None
        # A first turn's own prompt holds the whole document: only its end is worth reading.
        prompt = self._decoded(row.chosen, before, start)
        if number == 0 and prompt.text is not None:
            prompt = Text(prompt.text[-PROMPT_END_CHARS:], prompt.length)
        answers = [
            self._decoded(sequence, *spans[number])
            for sequence, spans in zip((row.chosen, row.rejected), starts_and_ends, strict=True)
        ]
        return PairView(
            id=row.id,
            turn=number + 1,
            num_turns=len(starts_and_ends[0]),
            location=str(row.location or ""),
            document=Text(None, Length(tokens=starts_and_ends[0][0][0])),
            chunk=self._decoded(chunk, 0, chunk.responses()[0][0]) if chunk else None,
            chunk_share=None,
            instruction=prompt,
            has_instruction=False,
            chosen=answers[0],
            rejected=answers[1],
            similarity=token_similarity(row, number),
            whole_prompts=True,
            note=note,
        )

    def _text(self, text: str) -> Text:
        return Text(text, self._ruler(text))

    def _decoded(self, sequence: TokenSequence, start: int, end: int) -> Text:
        tokenizer = self._ruler.tokenizer
        text = None
        if tokenizer is not None and int(sequence.tokens.max()) < tokenizer.vocab_size:
            text = tokenizer.decode(sequence.tokens[start:end])
        return Text(text, Length(tokens=end - start))


def token_similarity(row: TokenizedPair, number: int) -> float:
    """`similarity` of a turn's answers with tokens in the place of words."""
    chosen, rejected = (
        sequence.tokens[slice(*sequence.responses()[number])].tolist() for sequence in (row.chosen, row.rejected)
    )
    return similarity(chosen, rejected)
