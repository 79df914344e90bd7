"""Tokenized rows back to text: decoded, taken apart by the chat template's markers, and proved by tokenizing again.

Nothing is taken on trust. The result must give the row's own tokens and response marks when it is preprocessed with the
same tokenizer, template and prompt template; a row for which it does not is left out with a reason.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_longpo.data.chat_tokenizer import ChatTokenizer, Offsets
from megatron_longpo.data.document import CHOSEN, REJECTED, BranchPair, Tokens
from megatron_longpo.data.tokenize import DocumentTokenizer, PromptTemplate, tokenized_pair
from megatron_longpo.import_pairs.markers import find_markers
from megatron_longpo.import_pairs.split import chunk_span, document_before, split_prompts
from megatron_longpo.pair_formats.document import PreferenceDocument, TokenizedPair, TokenSequence, Turn

REASONS = {
    "unknown_tokens": "its tokens are not of this tokenizer: an id is outside of its vocabulary",
    "other_tokens": "its text makes other tokens with this tokenizer",
    "other_markers": "it has other text around its messages than the chat template writes",
    "other_instructions": "its turns or prompts do not hold the same instructions",
    "other_chunks": "its chunk is no piece of its document, or has another separator: see --prompt-template",
    "empty_text": "a message has no text, or both answers have the same",
    "refused_by_template": "the chat template refuses the conversation, or renders it without fixed answers",
    "other_responses": "its labels mark other tokens than the chat template's responses",
}
"""Why a row is left out, by the name it is counted under."""


class NotConvertible(Exception):
    """A row that cannot be turned into text exactly.

    Args:
        reason: A key of `REASONS`.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(REASONS[reason])
        self.reason = reason


@dataclass(frozen=True)
class Converted:
    """A row as text.

    Args:
        document: Its preference document.
        has_short_prompts: Without them, the document's text holds the first instruction.
        instruction_is_certain: False where the first instruction may begin earlier too (`split.py`).
    """

    document: PreferenceDocument
    has_short_prompts: bool
    instruction_is_certain: bool


@dataclass(frozen=True)
class _Conversation:
    """The users' messages and the answers to them."""

    users: tuple[str, ...]
    answers: tuple[str, ...]


class TokenizedConverter:
    """Turns tokenized rows into documents.

    Args:
        tokenizer: The tokenizer and chat template that made the tokens.
        prompt_template: How document and instruction made the user's message.

    Raises:
        ValueError: The chat template does not write messages one after another.
    """

    def __init__(self, tokenizer: ChatTokenizer, prompt_template: PromptTemplate) -> None:
        self._tokenizer = tokenizer
        self._prompt_template = prompt_template
        self._markers = find_markers(tokenizer)
        self._tokenize = DocumentTokenizer(tokenizer, prompt_template)

    def __call__(self, pair: TokenizedPair) -> Converted:
        """The row's document.

        Raises:
            NotConvertible: The row's tokens cannot be had from any text that was found.
        """
        chosen, rejected = (self._conversation(sequence) for sequence in (pair.chosen, pair.rejected))
        if chosen.users != rejected.users:
            raise NotConvertible("other_instructions")
        shorts = [self._short(pair, turn, chosen, rejected) for turn in range(len(pair.short_chosen))]
        converted = self._document(pair, chosen, rejected, shorts)
        self._prove(pair, converted.document)
        return converted

    def _conversation(self, sequence: TokenSequence) -> _Conversation:
        """The messages of one conversation."""
        if len(sequence.tokens) and int(sequence.tokens.max()) >= self._tokenizer.vocab_size:
            raise NotConvertible("unknown_tokens")
        text, starts, ends = self._text(sequence.tokens)
        users: list[str] = []
        answers: list[str] = []
        at = 0
        for start, end in sequence.responses():
            start_char, end_char = int(starts[start]), int(ends[end - 1])
            user = self._markers.user_message(text[at:start_char], is_first=not users)
            answer = self._markers.answer_message(text[start_char:end_char])
            if user is None or answer is None:
                raise NotConvertible("other_markers" if user is None else "other_responses")
            users.append(user)
            answers.append(answer)
            at = end_char
        return _Conversation(tuple(users), tuple(answers))

    def _text(self, tokens: Tokens) -> tuple[str, Offsets, Offsets]:
        """The text that makes these very tokens, and the characters of each: they say where the responses are."""
        # Some tokenizers put a blank before every piece of text between symbols, and decoding the whole takes off
        # only the first: these are decoded piece by piece.
        for decode in (self._tokenizer.decode, self._decode_pieces):
            text = decode(tokens)
            again, starts, ends = self._tokenizer.encode(text)
            if np.array_equal(again, tokens):
                return text, starts, ends
        raise NotConvertible("other_tokens")

    def _decode_pieces(self, tokens: Tokens) -> str:
        places = np.flatnonzero(np.isin(tokens, list(self._tokenizer.symbol_ids))).tolist()
        pieces = []
        for start, end in itertools.pairwise([-1, *places, len(tokens)]):
            pieces.append(self._tokenizer.decode(tokens[start + 1 : end]))
            pieces.append(self._tokenizer.decode(tokens[end : end + 1]))
        return "".join(pieces)

    def _short(self, pair: TokenizedPair, turn: int, chosen: _Conversation, rejected: _Conversation) -> str:
        """The user's message of a turn's short prompt; its answers must be those of the long conversations."""
        one, two = (self._conversation(side[turn]) for side in (pair.short_chosen, pair.short_rejected))
        if one.users != two.users:
            raise NotConvertible("other_instructions")
        if (*one.answers, *two.answers) != (chosen.answers[turn], rejected.answers[turn]):
            raise NotConvertible("other_responses")
        return one.users[0]

    def _document(
        self, pair: TokenizedPair, chosen: _Conversation, rejected: _Conversation, shorts: Sequence[str]
    ) -> Converted:
        document, instructions, chunks = chosen.users[0], ["", *chosen.users[1:]], [""] * len(shorts)
        is_certain = True
        for turn, short in enumerate(shorts):
            if turn == 0:
                split = split_prompts(self._prompt_template, document, short)
                if split is None:
                    raise NotConvertible("other_chunks")
                document, chunks[0], instructions[0] = split.document, split.chunk, split.instruction
                is_certain = split.is_only_one
            else:
                chunk = document_before(self._prompt_template, short, instructions[turn])
                if chunk is None:
                    raise NotConvertible("other_instructions")
                chunks[turn] = chunk
        turns = []
        for turn, (yes, no) in enumerate(zip(chosen.answers, rejected.answers, strict=True)):
            chunk = chunks[turn] if shorts else None
            span = chunk_span(document, chunk) if chunk else None
            turns.append(Turn(instructions[turn], yes, no, chunk, span))
        if not all(map(str.strip, _texts(document, turns, shorts))) or any(
            turn.chosen.strip() == turn.rejected.strip() for turn in turns
        ):
            raise NotConvertible("empty_text")
        result = PreferenceDocument(pair.id, document, tuple(turns), location=pair.location)
        return Converted(result, bool(shorts), is_certain)

    def _prove(self, pair: TokenizedPair, document: PreferenceDocument) -> None:
        """Tokenize the document and compare with the row, token by token and mark by mark."""
        try:
            ours = self._tokenize(document)
        except ValueError as error:
            raise NotConvertible("refused_by_template") from error
        theirs = tokenized_pair(pair)
        assert ours.joint is not None and theirs.joint is not None
        compared = [((ours.document_tokens, ours.joint), (theirs.document_tokens, theirs.joint))]
        for our, their in zip(ours.short, theirs.short, strict=True):
            compared.append(
                ((our.prefix_tokens, (our.chosen, our.rejected)), (their.prefix_tokens, (their.chosen, their.rejected)))
            )
        for mine, row in compared:
            for (our_tokens, our_spans), (their_tokens, their_spans) in zip(_whole(*mine), _whole(*row), strict=True):
                if not np.array_equal(our_tokens, their_tokens):
                    raise NotConvertible("other_tokens")
                if our_spans != their_spans:
                    raise NotConvertible("other_responses")


def _texts(document: str, turns: Sequence[Turn], shorts: Sequence[str]) -> Iterator[str]:
    """All texts that schema 1 wants filled in."""
    yield document
    for number, turn in enumerate(turns):
        yield from (turn.chosen, turn.rejected)
        if number > 0 or shorts:
            yield turn.instruction
        if shorts:
            yield turn.chunk or ""


def _whole(prefix: Tokens, pair: BranchPair) -> list[tuple[Tokens, list[tuple[int, int, int]]]]:
    """Both conversations with their prefix, and the responses' places in them."""
    return [
        (
            np.concatenate([prefix, pair[role].tokens]),
            [(turn, start + len(prefix), end + len(prefix)) for turn, start, end in pair[role].spans],
        )
        for role in (CHOSEN, REJECTED)
    ]
