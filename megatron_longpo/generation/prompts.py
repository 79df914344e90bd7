"""The wording of what the model is asked: for instructions about a chunk, and for an answer."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from megatron_longpo.data.chat_template import read_template
from megatron_longpo.generation.draw import draw
from megatron_longpo.generation.settings import GenerationSettings

INSTRUCTION_TEMPLATE = """\
{chunk}

You have just read a passage that belongs to a longer text. Think of somebody who knows the passage well and wants to \
see whether another reader has truly understood it. Write {num_instructions} different instructions or questions that \
this person could give.

Each of them must
- be answerable from the passage alone, by a reader who has nothing else at hand,
- require understanding and putting together several places of the passage, not copying one sentence,
- name people, things or functions as the passage does, so that it stays clear within the longer text,
- have a focus of its own; let at least one of them be about {focus},
- be complete in one or two sentences, without a hint at its answer.

Write a numbered list from 1 to {num_instructions}, one instruction a line, and nothing else."""

FOCUSES = (
    "how two parts of the passage are related",
    "why something happens or is done",
    "a summary for a particular reader",
    "a comparison of two things that the passage describes",
    "what follows from the passage but is not said in it",
    "the order of events or steps",
    "an exception, a limit or a condition",
    "the evidence for a statement",
    "how the pieces work together",
    "what would change under other circumstances",
)
"""One is drawn for each chunk, so that the pools of many chunks do not all look alike."""

PHRASES = (
    "",
    "",
    "Based on the text above: ",
    "Using only the text above, do the following. ",
    "Read the text above carefully. ",
    "With the text above in mind: ",
    "Here is a task about the text above. ",
    "Answer from the text above. ",
)
"""What connects the text with an instruction; one is drawn for each turn and becomes part of its instruction."""

_PLACEHOLDER = re.compile(r"\{(chunk|num_instructions|focus)\}")


@dataclass(frozen=True)
class PromptWriter:
    """Writes prompts from templates.

    Args:
        instruction_template: Text with ``{chunk}`` and ``{num_instructions}``, and with ``{focus}`` if wanted; other
            braces are plain text.
        num_instructions: Instructions to ask for.
        seed: Of the run.
        chat_template: Another than the tokenizer's own; it decides the prompts' tokens.
    """

    instruction_template: str
    num_instructions: int
    seed: int
    chat_template: str | None = None

    def pool_request(self, chunk: str, document_id: str, chunk_number: int) -> str:
        """The request for a pool of instructions about a chunk."""
        focus = FOCUSES[draw(self.seed, document_id, "focus", chunk_number) % len(FOCUSES)]
        values = {"chunk": chunk, "num_instructions": str(self.num_instructions), "focus": focus}
        # One pass over the template: a chunk that contains a placeholder is left as it is.
        return _PLACEHOLDER.sub(lambda match: values[match[1]], self.instruction_template)

    def phrase(self, document_id: str, chunk_number: int) -> str:
        """The connecting phrase of a turn, drawn."""
        return PHRASES[draw(self.seed, document_id, "phrase", chunk_number) % len(PHRASES)]

    @property
    def hash(self) -> str:
        """SHA-256 of everything that the wording of prompts depends on, besides the documents."""
        wording: tuple[object, ...] = (self.instruction_template, self.num_instructions, FOCUSES, PHRASES)
        # Not in the hash without one: runs that began before there was such a flag go on.
        everything = repr(wording if self.chat_template is None else (*wording, self.chat_template))
        return hashlib.sha256(everything.encode()).hexdigest()


def read_instruction_template(path: str | None) -> str:
    """The template of ``--instruction-template``, or our own.

    Raises:
        ValueError: The file cannot be read, or lacks a placeholder.
    """
    if path is None:
        return INSTRUCTION_TEMPLATE
    try:
        template = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--instruction-template {path}: cannot be read as a text file ({error})") from error
    for name in ("{chunk}", "{num_instructions}"):
        if name not in template:
            raise ValueError(f"--instruction-template {path} must contain {name}")
    return template


def prompt_writer(settings: GenerationSettings) -> PromptWriter:
    """The wording of a run."""
    template = read_instruction_template(settings.instruction_template)
    chat_template = read_template(settings.chat_template)
    return PromptWriter(template, settings.instructions_per_chunk, settings.seed, chat_template)
