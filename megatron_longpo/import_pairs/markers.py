"""What a chat template writes around messages, found by letting it write a conversation with known ones."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_longpo.data.chat_tokenizer import ChatTokenizer

_WORDS = ("Q1x7", "A2y8", "Q3z9", "A4w6")
"""Messages that no template contains, without blanks around them that a template might cut off."""


@dataclass(frozen=True)
class Markers:
    """The text of a conversation is ``first`` user ``answer`` chosen ``end`` ``next`` user ``answer`` chosen ``end``…

    Args:
        first: Before the first user's message: begin token, a default system message, the role.
        answer: Between a user's message and the answer: all that the generation prompt writes.
        lead: What the template writes between the generation prompt and the answer, a blank mostly or nothing.
        end: Behind an answer.
        next: Between the end of an answer and the next user's message.
    """

    first: str
    answer: str
    lead: str
    end: str
    next: str

    def user_message(self, text: str, is_first: bool) -> str | None:
        """The user's message in the text before an answer; None if other markers stand there."""
        before = self.first if is_first else self.next
        if len(text) < len(before) + len(self.answer) or not (text.startswith(before) and text.endswith(self.answer)):
            return None
        return text[len(before) : len(text) - len(self.answer)]

    def answer_message(self, text: str) -> str | None:
        """The message in the text of a response; None if other markers stand there."""
        if len(text) < len(self.lead) + len(self.end) or not (text.startswith(self.lead) and text.endswith(self.end)):
            return None
        return text[len(self.lead) : len(text) - len(self.end)]


def find_markers(tokenizer: ChatTokenizer) -> Markers:
    """The markers of a tokenizer's chat template.

    Raises:
        ValueError: The template does not write messages one after another.
    """
    roles = ("user", "assistant", "user", "assistant")
    chat = [{"role": role, "content": word} for role, word in zip(roles, _WORDS, strict=True)]
    prompt = tokenizer.render(chat[:1], add_generation_prompt=True)
    text = tokenizer.render(chat)
    places = [text.find(word) for word in _WORDS]
    if not text.startswith(prompt) or min(places) < 0 or places != sorted(places):
        raise ValueError(
            f"the chat template of {tokenizer.path} does not write the messages of a conversation one after another, "
            f"so tokenized rows cannot be taken apart by it; pass another one with --chat-template"
        )
    starts_and_ends = [(place, place + len(word)) for place, word in zip(places, _WORDS, strict=True)]
    (first, first_end), (answer, answer_end), (second, _), (_, last_end) = starts_and_ends
    end = text[last_end:]
    return Markers(
        first=text[:first],
        answer=prompt[first_end:],
        lead=text[len(prompt) : answer],
        end=end,
        next=text[answer_end:second].removeprefix(end),
    )
