"""TRL's preference rows: ``prompt``, ``chosen``, ``rejected``, and our addition ``short_prompt``.

Conversational rows hold lists of messages. ``prompt`` may be missing there, or be what both conversations start with;
otherwise they follow it. Plain rows hold strings: the prompt is taken as the user's message and goes through the chat
template like any other. Every row is one turn, whose prompt already contains the instruction. What a chat template
would render besides roles and contents is refused; other columns are ignored.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_longpo.pair_formats.document import Location, Message, PairsError, PreferenceDocument, Turn
from megatron_longpo.pair_formats.fields import check_answers, checked_text, kind_of

_TEMPLATE_ARGUMENTS = ("tools", "chat_template_kwargs")
"""Columns that TRL's DPOTrainer gives to the chat template with the row."""

_MESSAGE_FIELDS = ("role", "content", "name")
"""``name`` is what some sets call a speaker by, and the templates of the supported models do not render."""


def parse(row: Mapping[str, Any], where: Location) -> PreferenceDocument:
    """A TRL row as a document of one turn.

    Raises:
        PairsError: The row is not a usable preference pair.
    """
    for key in _TEMPLATE_ARGUMENTS:
        _refuse_unread(row.get(key), key, where)
    prompt, chosen, rejected = _prompt_and_answers(row, where)
    long_context, document = _last_user_message(prompt, "prompt", where)
    short_context: tuple[Message, ...] = ()
    chunk = None
    if row.get("short_prompt") is not None:
        short_prompt = _as_messages(row["short_prompt"], "short_prompt", where)
        short_context, chunk = _last_user_message(short_prompt, "short_prompt", where)
    return PreferenceDocument(
        id=row_id(row, where),
        document=document,
        turns=(check_answers(Turn("", chosen, rejected, chunk), where),),
        long_context=long_context,
        short_context=short_context,
        location=where,
    )


def row_id(row: Mapping[str, Any], where: Location) -> str:
    """The row's own id, or one made of file name and line."""
    for key in ("id", "prompt_id"):
        value = row.get(key)
        if isinstance(value, str | int) and not isinstance(value, bool) and str(value).strip():
            return checked_text(str(value), key, where)
    return f"{Path(where.file).name}:{where.line}"


def _prompt_and_answers(row: Mapping[str, Any], where: Location) -> tuple[tuple[Message, ...], str, str]:
    chosen, rejected = row["chosen"], row["rejected"]
    if not isinstance(chosen, list) and not isinstance(rejected, list):
        if row.get("prompt") is None:
            raise PairsError(where, "prompt", "is missing", "add it; only lists of messages can do without")
        prompt = _as_messages(row["prompt"], "prompt", where)
        return prompt, checked_text(chosen, "chosen", where), checked_text(rejected, "rejected", where)
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        problem = f"is {kind_of(rejected)} and 'chosen' is {kind_of(chosen)}"
        raise PairsError(where, "rejected", problem, "make both strings or both lists of messages")
    long_chosen, long_rejected = (_as_messages(row[key], key, where) for key in ("chosen", "rejected"))
    given, prompt = row.get("prompt"), long_chosen[:-1]
    if long_rejected[:-1] != prompt:
        problem = "does not start with the messages that 'chosen' starts with"
        raise PairsError(where, "rejected", problem, "a pair must differ in the last message only")
    # A string beside whole conversations repeats the user's message in them, as in UltraFeedback.
    if not prompt or (isinstance(given, list) and given):
        if given is None:
            raise PairsError(where, "prompt", "is missing", "add it, or put its messages before both answers")
        before = _as_messages(given, "prompt", where)
        prompt = prompt if prompt[: len(before)] == before else before + prompt
    for key, conversation in (("chosen", long_chosen), ("rejected", long_rejected)):
        if conversation[-1].role != "assistant":
            problem = f"ends with a message of role {conversation[-1].role!r}"
            raise PairsError(where, key, problem, "the last message must be the assistant's answer")
    return prompt, long_chosen[-1].content, long_rejected[-1].content


def _as_messages(value: Any, name: str, where: Location) -> tuple[Message, ...]:
    if not isinstance(value, list):
        return (Message("user", checked_text(value, name, where)),)
    if not value:
        raise PairsError(where, name, "is an empty list", "give at least one message")
    messages = []
    for number, message in enumerate(value):
        at = f"{name}[{number}]"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise PairsError(where, at, "is not a message", 'write {"role": "…", "content": "…"}')
        for key, field in message.items():
            if key not in _MESSAGE_FIELDS:
                _refuse_unread(field, f"{at}.{key}", where)
        messages.append(Message(message["role"], checked_text(message.get("content"), f"{at}.content", where)))
    return tuple(messages)


def _last_user_message(messages: Sequence[Message], name: str, where: Location) -> tuple[tuple[Message, ...], str]:
    *context, last = messages
    if last.role != "user":
        problem = f"ends with a message of role {last.role!r}"
        raise PairsError(
            where, f"{name}[{len(context)}].role", problem, "the last message of a prompt must be the user's"
        )
    return tuple(context), last.content


def _refuse_unread(value: Any, name: str, where: Location) -> None:
    if not _is_void(value):
        problem = f"is {reprlib.repr(value)}, which a chat template may render and this reader does not"
        raise PairsError(where, name, problem, "write it into a message's content, or remove it from every row")


def _is_void(value: Any) -> bool:
    """Null, or holding nothing else: what Arrow fills in where a row lacks a field that others have."""
    if isinstance(value, Mapping):
        return all(map(_is_void, value.values()))
    return value in (None, "") or (isinstance(value, list) and all(map(_is_void, value)))
