"""Schema 1, the project's own format: one document a line.

    {"schema": 1, "id": "…", "document": "…", "turns": [{"chunk_span": [start, end], "instruction": "…",
     "chosen": "…", "rejected": "…"}], "provenance": {…}}

``chunk_span`` counts characters (Unicode code points) of the document, end excluded. ``chunk`` with the text may stand
instead of it or beside it. What other formats have and this one does not ask for is written out, never left out by
mistake: ``"instruction": null`` where document and chunk end with it already, ``"chunk": null`` where there is no short
prompt, ``long_context`` and ``short_context`` for messages before the prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_longpo.pair_formats.document import Location, Message, PairsError, PreferenceDocument, Turn
from megatron_longpo.pair_formats.fields import check_answers, check_known, checked_text, kind_of, text

SCHEMA = 1

_CONTEXTS = ("long_context", "short_context")
_LINE_FIELDS = ("schema", "id", "document", "turns", "provenance", *_CONTEXTS)
_TURN_FIELDS = ("chunk_span", "chunk", "instruction", "chosen", "rejected", "provenance")


def parse(row: Mapping[str, Any], where: Location) -> PreferenceDocument:
    """A row of schema 1 as a document.

    Raises:
        PairsError: The row breaks the schema.
    """
    schema = row.get("schema")
    if schema != SCHEMA or isinstance(schema, bool):
        raise PairsError(where, "schema", f"is {schema!r}", f"this version reads schema {SCHEMA}")
    check_known(row, _LINE_FIELDS, where)
    document = text(row, "document", where)
    turns = row.get("turns")
    if not isinstance(turns, list) or not turns:
        problem = "is missing" if "turns" not in row else f"is {kind_of(turns) if turns != [] else 'empty'}"
        raise PairsError(where, "turns", problem, "give a list of at least one turn")
    return PreferenceDocument(
        id=text(row, "id", where),
        document=document,
        turns=tuple(_turn(turn, i, document, where) for i, turn in enumerate(turns)),
        provenance=_provenance(row, where, ""),
        long_context=_context(row, "long_context", where),
        short_context=_context(row, "short_context", where),
        location=where,
    )


def dump(document: PreferenceDocument) -> dict[str, Any]:
    """The row of a document; `parse` gives the document back."""
    contexts = {name: getattr(document, name) for name in _CONTEXTS}
    return {
        "schema": SCHEMA,
        "id": document.id,
        "document": document.document,
        **{
            name: [{"role": message.role, "content": message.content} for message in messages]
            for name, messages in contexts.items()
            if messages
        },
        "turns": [_dump_turn(turn) for turn in document.turns],
        "provenance": dict(document.provenance),
    }


def _turn(turn: Any, number: int, document: str, where: Location) -> Turn:
    name = f"turns[{number}]"
    if not isinstance(turn, Mapping):
        raise PairsError(where, name, f"is {kind_of(turn)}, not an object", "write every turn as an object")
    path = f"{name}."
    check_known(turn, _TURN_FIELDS, where, path)
    span = _chunk_span(turn["chunk_span"], document, where, f"{path}chunk_span") if "chunk_span" in turn else None
    chunk = checked_text(document[slice(*span)], f"{path}chunk_span", where) if span else None
    has_short_prompt = span is not None or "chunk" not in turn or turn["chunk"] is not None
    if "chunk" in turn and has_short_prompt:
        given = text(turn, "chunk", where, path)
        if chunk is not None and given != chunk:
            raise PairsError(
                where, f"{path}chunk", "is not the text at 'chunk_span'", "correct one of the two or leave one out"
            )
        chunk = given
    elif chunk is None and has_short_prompt:
        raise PairsError(where, f"{path}chunk_span", "is missing", "add it, or the chunk's text as 'chunk'")
    within_prompt = number == 0 and "instruction" in turn and turn["instruction"] is None
    instruction = "" if within_prompt else text(turn, "instruction", where, path)
    chosen, rejected = (text(turn, key, where, path) for key in ("chosen", "rejected"))
    return check_answers(Turn(instruction, chosen, rejected, chunk, span, _provenance(turn, where, path)), where, path)


def _context(row: Mapping[str, Any], name: str, where: Location) -> tuple[Message, ...]:
    messages = row.get(name, [])
    if not isinstance(messages, list):
        raise PairsError(where, name, f"is {kind_of(messages)}, not a list", "write it as a list of messages")
    return tuple(_message(message, where, f"{name}[{i}]") for i, message in enumerate(messages))


def _message(message: Any, where: Location, name: str) -> Message:
    if not isinstance(message, Mapping):
        raise PairsError(where, name, f"is {kind_of(message)}, not an object", 'write {"role": "…", "content": "…"}')
    check_known(message, ("role", "content"), where, f"{name}.")
    return Message(text(message, "role", where, f"{name}."), text(message, "content", where, f"{name}."))


def _provenance(row: Mapping[str, Any], where: Location, path: str) -> Mapping[str, Any]:
    provenance = row.get("provenance", {})
    if not isinstance(provenance, Mapping):
        raise PairsError(
            where, f"{path}provenance", f"is {kind_of(provenance)}, not an object", "write it as an object"
        )
    return provenance


def _chunk_span(value: Any, document: str, where: Location, name: str) -> tuple[int, int]:
    numbers = value if isinstance(value, list) else []
    if len(numbers) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
        raise PairsError(where, name, "is not a list of two whole numbers", "write [start_char, end_char]")
    start, end = numbers
    if not 0 <= start < end <= len(document):
        raise PairsError(
            where,
            name,
            f"is [{start}, {end}], outside of the document's {len(document)} characters",
            f"it must satisfy 0 <= start < end <= {len(document)}",
        )
    return start, end


def _dump_turn(turn: Turn) -> dict[str, Any]:
    chunk = {"chunk": turn.chunk} if turn.chunk_span is None else {"chunk_span": list(turn.chunk_span)}
    provenance = {"provenance": dict(turn.provenance)} if turn.provenance else {}
    answers = {"instruction": turn.instruction or None, "chosen": turn.chosen, "rejected": turn.rejected}
    return {**chunk, **answers, **provenance}
