"""Where a prompt's document ends and its instruction begins, from what the long and the short prompt share.

Both prompts of a turn are made of the same template and instruction, `{document}\\n\\n{instruction}` say, and the chunk
was cut from the document. So the instruction is a piece behind a separator that both messages end with, and that leaves
a chunk which lies in the document:

    long  message   ….. the document ….. \\n\\n What is it?
    short message            a chunk     \\n\\n What is it?

Mostly one place fits. Where the chunk is the end of the document, several paragraphs may; then the shortest instruction
is taken, and the result says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_longpo.data.encoding import common_prefix_chars
from megatron_longpo.data.tokenize import PromptTemplate


@dataclass(frozen=True)
class Split:
    """A long and a short message taken apart.

    Args:
        document: C_L.
        chunk: C_S, a piece of the document.
        instruction: I.
        is_only_one: False where longer instructions would fit too.
    """

    document: str
    chunk: str
    instruction: str
    is_only_one: bool


def split_prompts(template: PromptTemplate, long: str, short: str) -> Split | None:
    """Take a turn's two messages apart; None where no place fits.

    Args:
        template: What made the messages.
        long: The user's message with the document.
        short: The user's message with the chunk.
    """
    limit = _num_shared_chars(long, short, from_end=template.document_first)
    found: Split | None = None
    for chunk, instruction in splits(template, short, limit):
        document = document_before(template, long, instruction)
        if document is None or chunk not in document:
            continue
        if found is not None:
            return Split(found.document, found.chunk, found.instruction, is_only_one=False)
        found = Split(document, chunk, instruction, is_only_one=True)
    return found


def document_before(template: PromptTemplate, message: str, instruction: str) -> str | None:
    """What the template put an instruction to, to make a message; None if it made none such."""
    before, between, after = template.parts
    if template.document_first:
        head, tail = before, between + instruction + after
    else:
        head, tail = before + instruction + between, after
    if len(head) + len(tail) >= len(message) or not (message.startswith(head) and message.endswith(tail)):
        return None
    return message[len(head) : len(message) - len(tail)]


def splits(template: PromptTemplate, message: str, max_instruction_chars: int) -> Iterator[tuple[str, str]]:
    """Every (document, instruction) that the template makes a message of, the shortest instruction first."""
    before, between, after = template.parts
    if len(before) + len(after) > len(message) or not (message.startswith(before) and message.endswith(after)):
        return
    body = message[len(before) : len(message) - len(after)]
    for at in _separators(body, between, max_instruction_chars, from_end=template.document_first):
        first, second = body[:at], body[at + len(between) :]
        document, instruction = (first, second) if template.document_first else (second, first)
        if document.strip() and instruction.strip():
            yield document, instruction


def chunk_span(document: str, chunk: str) -> tuple[int, int] | None:
    """Where a chunk lies in its document, in characters; None where that is nowhere, or more than one place."""
    start = document.find(chunk)
    if start < 0 or document.find(chunk, start + 1) >= 0:
        return None
    return start, start + len(chunk)


def _separators(body: str, between: str, max_distance: int, from_end: bool) -> Iterator[int]:
    """Where a separator begins, going inwards from one end, with at most a number of characters outside of it."""
    if from_end:
        low = max(0, len(body) - max_distance - len(between))
        at = body.rfind(between, low)
        while at >= 0:
            yield at
            stop = at + len(between) - 1
            at = body.rfind(between, low, stop) if stop >= low else -1
    else:
        high = min(len(body), max_distance + len(between))
        at = body.find(between, 0, high)
        while at >= 0:
            yield at
            at = body.find(between, at + 1, high) if at < high else -1


def _num_shared_chars(first: str, second: str, from_end: bool) -> int:
    """Length of what two texts end with, or begin with, alike."""
    if from_end:
        first, second = first[-len(second) :][::-1], second[-len(first) :][::-1]
    return common_prefix_chars(first, second)
