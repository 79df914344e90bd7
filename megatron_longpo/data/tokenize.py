"""From a document with turns, in text, to its tokens.

A conversation is rendered by the chat template and encoded once. The response tokens of a turn are exactly those that
the template renders for that assistant message behind the generation prompt, end-of-turn marker included: their
characters are known by rendering the conversation up to that message with ``add_generation_prompt``, and a token
belongs to the response if any of its characters does, so one that straddles the boundary is the response's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_longpo.data.chat_tokenizer import ChatTokenizer, Offsets
from megatron_longpo.data.document import (
    Branch,
    BranchPair,
    ShortPrompt,
    TokenizedDocument,
    Tokens,
    common_prefix_length,
)
from megatron_longpo.data.encoding import SharedPrefixEncoder
from megatron_longpo.pairs import Message, PreferenceDocument, TokenizedPair, TokenSequence, Turn

DEFAULT_PROMPT_TEMPLATE = "{document}\n\n{instruction}"


class PromptTemplate:
    """How document (or chunk) and instruction make the user's message.

    Args:
        template: Text with ``{document}`` and ``{instruction}``, each once; other braces are plain text.

    Raises:
        ValueError: A placeholder is missing or repeated.
    """

    def __init__(self, template: str = DEFAULT_PROMPT_TEMPLATE) -> None:
        for name in ("{document}", "{instruction}"):
            if template.count(name) != 1:
                raise ValueError(f"--prompt-template {template!r} must contain {name} exactly once")
        self.template = template
        self.document_first = template.index("{document}") < template.index("{instruction}")
        first, second = ("{document}", "{instruction}") if self.document_first else ("{instruction}", "{document}")
        before, _, rest = template.partition(first)
        between, _, after = rest.partition(second)
        self.parts = (before, between, after)

    def fill(self, document: str, instruction: str) -> str:
        """The user's message; a document that needs no instruction (TRL rows) is the message itself."""
        if not instruction:
            return document
        first, second = (document, instruction) if self.document_first else (instruction, document)
        before, between, after = self.parts
        return f"{before}{first}{between}{second}{after}"


@dataclass(frozen=True, eq=False)
class _Conversation:
    """int32 tokens ``[T]`` and the responses' ``(turn, start, end)`` in them."""

    tokens: Tokens
    spans: tuple[tuple[int, int, int], ...]

    def after(self, length: int) -> Branch:
        """The branch behind the first ``length`` tokens."""
        return Branch(self.tokens[length:], tuple((turn, s - length, e - length) for turn, s, e in self.spans))


class DocumentTokenizer:
    """Tokenizes documents, one after another.

    Args:
        tokenizer: Tokenizer and chat template.
        prompt_template: How document and instruction make a message.
        turns: ``joint`` makes joint and independent conversations, ``independent`` only the latter, which is all that
            templates can do which render earlier turns differently once later ones follow.
    """

    def __init__(
        self, tokenizer: ChatTokenizer, prompt_template: PromptTemplate | None = None, turns: str = "joint"
    ) -> None:
        self._tokenizer = tokenizer
        self._long_encoder = SharedPrefixEncoder(tokenizer)
        self._short_encoder = SharedPrefixEncoder(tokenizer)
        self._prompt_template = prompt_template or PromptTemplate()
        self._turns = turns

    def __call__(self, document: PreferenceDocument) -> TokenizedDocument:
        """The document's tokens.

        Raises:
            ValueError: The chat template cannot tell where the answers are, or renders none.
        """
        turns = range(len(document.turns))
        independent = [[self._long(document, [turn], role) for role in (0, 1)] for turn in turns]
        joint = None
        if self._turns == "joint":
            joint = independent[0] if len(turns) == 1 else [self._long(document, turns, role) for role in (0, 1)]

        conversations = [c for pair in [*independent, *([joint] if joint else [])] for c in pair]
        shared = _shared_tokens(conversations)
        return TokenizedDocument(
            id=document.id,
            document_tokens=conversations[0].tokens[:shared],
            joint=_branches(joint, shared) if joint else None,
            independent=tuple(_branches(pair, shared) for pair in independent),
            short=self._short(document),
        )

    def _long(self, document: PreferenceDocument, turns: Sequence[int], role: int) -> _Conversation:
        """The conversation over some turns; the first of them comes with the document."""
        messages = list(document.long_context)
        for turn in turns:
            text = document.turns[turn].instruction
            if turn == turns[0]:
                text = self._prompt_template.fill(document.document, text)
            messages += [Message("user", text), Message("assistant", _answer(document.turns[turn], role))]
        return self._conversation(messages, turns, self._long_encoder, document)

    def _short(self, document: PreferenceDocument) -> tuple[ShortPrompt, ...]:
        shorts = []
        for number, turn in enumerate(document.turns):
            if turn.chunk is None:
                return ()
            prompt = Message("user", self._prompt_template.fill(turn.chunk, turn.instruction))
            pair = [
                self._conversation(
                    [*document.short_context, prompt, Message("assistant", _answer(turn, role))],
                    [number],
                    self._short_encoder,
                    document,
                )
                for role in (0, 1)
            ]
            shared = _shared_tokens(pair)
            shorts.append(ShortPrompt(pair[0].tokens[:shared], *_branches(pair, shared)))
        return tuple(shorts)

    def _conversation(
        self,
        messages: Sequence[Message],
        turns: Sequence[int],
        encoder: SharedPrefixEncoder,
        document: PreferenceDocument,
    ) -> _Conversation:
        chat = [{"role": message.role, "content": message.content} for message in messages]
        text = self._render(chat, document)
        first_answer = len(chat) - 2 * len(turns) + 1
        boundaries = [self._response_chars(chat, first_answer + 2 * i, text, document) for i in range(len(turns))]
        tokens, starts, ends = encoder.encode(text)
        spans = []
        for turn, (start_char, end_char) in zip(turns, boundaries, strict=True):
            start, end = _token_span(starts, ends, start_char, end_char)
            if start == end:
                raise ValueError(
                    f"{_name(document)} turn {turn}: its answer has no token of its own (characters {start_char} to "
                    f"{end_char} of the rendered conversation); check the chat template and the tokenizer's normalizer"
                )
            spans.append((turn, start, end))
        return _Conversation(tokens, tuple(spans))

    def _render(
        self, chat: Sequence[dict[str, str]], document: PreferenceDocument, add_generation_prompt: bool = False
    ) -> str:
        try:
            return self._tokenizer.render(chat, add_generation_prompt)
        except ValueError as error:
            raise ValueError(f"{_name(document)}: {error}") from error

    def _response_chars(
        self, chat: Sequence[dict[str, str]], answer: int, text: str, document: PreferenceDocument
    ) -> tuple[int, int]:
        """Where the template puts one assistant message in the rendered conversation, in characters."""
        prompt = self._render(chat[:answer], document, add_generation_prompt=True)
        upto = text if answer == len(chat) - 1 else self._render(chat[: answer + 1], document)
        if not upto.startswith(prompt):
            raise ValueError(
                f"{_name(document)}: the chat template of {self._tokenizer.path} does not render an answer behind its "
                f"own generation prompt (it ends with {prompt[-40:]!r}), so the answer's tokens cannot be told; pass a "
                f"template that does with --chat-template"
            )
        if not text.startswith(upto):
            raise ValueError(
                f"{_name(document)}: the chat template of {self._tokenizer.path} renders an earlier turn differently "
                f"once later turns follow, so joint conversations have no fixed answers; preprocess and train with "
                f"--turns independent, or pass another template with --chat-template"
            )
        return len(prompt), len(upto)


def tokenized_pair(pair: TokenizedPair) -> TokenizedDocument:
    """A row that is already tokens; it has no independent conversations unless it has a single turn."""
    joint = [_as_conversation(sequence) for sequence in (pair.chosen, pair.rejected)]
    shared = _shared_tokens(joint)
    branches = _branches(joint, shared)
    shorts = []
    for turn, sequences in enumerate(zip(pair.short_chosen, pair.short_rejected, strict=True)):
        short = [_as_conversation(sequence, turn) for sequence in sequences]
        length = _shared_tokens(short)
        shorts.append(ShortPrompt(short[0].tokens[:length], *_branches(short, length)))
    return TokenizedDocument(
        id=pair.id,
        document_tokens=joint[0].tokens[:shared],
        joint=branches,
        independent=(branches,) if len(branches[0].spans) == 1 else (),
        short=tuple(shorts),
    )


def _as_conversation(sequence: TokenSequence, first_turn: int = 0) -> _Conversation:
    spans = tuple((turn, start, end) for turn, (start, end) in enumerate(sequence.responses(), first_turn))
    return _Conversation(sequence.tokens, spans)


def _token_span(starts: Offsets, ends: Offsets, start_char: int, end_char: int) -> tuple[int, int]:
    """The tokens with a character in ``[start_char, end_char)``.

    Tokens without characters (the leading bytes of one, a blank that the tokenizer puts before a text) go with the
    character that follows them.
    """
    behind_start = np.flatnonzero((starts >= start_char) | (ends > start_char))
    before_end = np.flatnonzero(starts < end_char)
    first = int(behind_start[0]) if len(behind_start) else len(starts)
    return first, max(first, int(before_end[-1]) + 1 if len(before_end) else 0)


def _shared_tokens(conversations: Sequence[_Conversation]) -> int:
    """Tokens that all conversations start with, up to the first response."""
    first_response = min(conversation.spans[0][1] for conversation in conversations)
    return min(first_response, common_prefix_length(*(conversation.tokens for conversation in conversations)))


def _branches(pair: Sequence[_Conversation], shared: int) -> BranchPair:
    chosen, rejected = pair
    return chosen.after(shared), rejected.after(shared)


def _answer(turn: Turn, role: int) -> str:
    return (turn.chosen, turn.rejected)[role]


def _name(document: PreferenceDocument) -> str:
    return f"{document.location}: document {document.id!r}" if document.location else f"document {document.id!r}"
