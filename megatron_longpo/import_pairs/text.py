"""Text rows in schema 1: prompts that hold their instruction are taken apart where the two prompts say how."""

from __future__ import annotations

from dataclasses import replace

from megatron_longpo.data.tokenize import PromptTemplate
from megatron_longpo.import_pairs.split import chunk_span, split_prompts
from megatron_longpo.pair_formats.document import PreferenceDocument

SPLIT, SPLIT_UNSURE, WHOLE = "split", "split_unsure", "whole"
"""What was done with prompts: taken apart; taken apart with the shortest instruction that fits; left as they are."""


def split_document(document: PreferenceDocument, template: PromptTemplate) -> tuple[PreferenceDocument, str]:
    """A document of one turn without an instruction of its own, with it if the short prompt tells where it begins.

    Filled into the template again, the parts make the very messages that the row had.
    """
    (turn,) = document.turns
    split = split_prompts(template, document.document, turn.chunk) if turn.chunk else None
    if split is None:
        return document, WHOLE
    span = chunk_span(split.document, split.chunk)
    turn = replace(turn, instruction=split.instruction, chunk=split.chunk, chunk_span=span)
    return replace(document, document=split.document, turns=(turn,)), SPLIT if split.is_only_one else SPLIT_UNSURE
