"""TRL rows: plain and conversational, with and without a prompt of their own."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_longpo.pair_formats import trl
from megatron_longpo.pair_formats.document import Location, Message, PairsError, Turn

HERE = Location("some/where.jsonl", 3)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


SYSTEM = {"role": "system", "content": "Be brief."}


def test_plain_rows() -> None:
    row = {"prompt": "Long text. Why?", "chosen": "So.", "rejected": "No.", "short_prompt": "Text. Why?", "score": 1}
    document = trl.parse(row, HERE)
    assert document.document == "Long text. Why?"
    assert document.turns == (Turn("", "So.", "No.", "Text. Why?"),)
    assert document.id == "where.jsonl:3"
    assert document.long_context == document.short_context == ()


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [SYSTEM, user("Long?")], "chosen": [assistant("So.")], "rejected": [assistant("No.")]},
        {"chosen": [SYSTEM, user("Long?"), assistant("So.")], "rejected": [SYSTEM, user("Long?"), assistant("No.")]},
        {
            "prompt": "Long?",
            "chosen": [SYSTEM, user("Long?"), assistant("So.")],
            "rejected": [SYSTEM, user("Long?"), assistant("No.")],
        },
    ],
)
def test_conversational_rows(row: dict[str, Any]) -> None:
    document = trl.parse({**row, "short_prompt": [user("Short?")]}, HERE)
    assert (document.document, document.long_context) == ("Long?", (Message("system", "Be brief."),))
    assert document.turns == (Turn("", "So.", "No.", "Short?"),)
    assert document.short_context == ()
    assert trl.parse(row, HERE).turns[0].chunk is None


def test_answers_of_several_messages_follow_a_prompt_of_their_own() -> None:
    """TRL renders the prompt's messages and then the completion's."""
    before = [assistant("Which one?"), user("The first?")]
    row = {
        "prompt": [SYSTEM, user("Long?")],
        "chosen": [*before, assistant("So.")],
        "rejected": [*before, assistant("No.")],
    }
    document = trl.parse(row, HERE)
    assert document.document == "The first?"
    assert [message.content for message in document.long_context] == ["Be brief.", "Long?", "Which one?"]
    assert document.turns == (Turn("", "So.", "No.", None),)
    # Beside whole conversations a prompt says nothing new.
    whole = {key: [*row["prompt"], *row[key]] for key in ("chosen", "rejected")}
    for repeated in (row["prompt"], [SYSTEM], [*row["prompt"], *before], [], None, "Long?"):
        assert trl.parse({**whole, "prompt": repeated}, HERE) == document
    with pytest.raises(PairsError, match=r"'rejected' does not start with the messages"):
        trl.parse({**row, "rejected": [assistant("No.")]}, HERE)


def test_what_arrow_fills_in_says_nothing() -> None:
    call = {"id": None, "function": {"name": None, "arguments": None}}
    filled = {"tool_calls": None, "reasoning_content": None, "name": "Ann", "parts": [], "calls": [call]}
    row = {"prompt": [user("Long?")], "chosen": [assistant("So.")], "rejected": [assistant("No.")]}
    expected = trl.parse(row, HERE)
    row = {key: [message | filled for message in messages] for key, messages in row.items()}
    for empty in ({"tools": None, "chat_template_kwargs": {"enable_thinking": None}}, {"tools": []}, {"tools": ""}):
        assert trl.parse(row | empty, HERE) == expected


def test_ids_are_taken_from_the_row() -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert trl.parse({**row, "id": "mine"}, HERE).id == "mine"
    assert trl.parse({**row, "prompt_id": 12}, HERE).id == "12"
    assert trl.parse({**row, "id": ""}, HERE).id == "where.jsonl:3"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "a", "rejected": "b"}, "field 'prompt' is missing"),
        ({"prompt": "p", "chosen": "a", "rejected": "a "}, "field 'rejected' is identical to 'chosen'"),
        ({"prompt": "p", "chosen": "", "rejected": "b"}, "field 'chosen' is empty"),
        ({"prompt": "p", "chosen": "a", "rejected": None}, "field 'rejected' is null"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "field 'prompt' is empty"),
        ({"prompt": "p", "chosen": "a", "rejected": [assistant("b")]}, "make both strings or both lists"),
        ({"chosen": [assistant("a")], "rejected": [assistant("b")]}, "field 'prompt' is missing"),
        ({"prompt": [], "chosen": [assistant("a")], "rejected": [assistant("b")]}, "field 'prompt' is an empty list"),
        ({"prompt": "p", "chosen": [], "rejected": [assistant("b")]}, "field 'chosen' is an empty list"),
        ({"prompt": "p", "chosen": [user("a")], "rejected": [assistant("b")]}, "'chosen' ends with .* 'user'"),
        ({"prompt": [assistant("p")], "chosen": [assistant("a")], "rejected": [assistant("b")]}, r"prompt\[0\]\.role"),
        (
            {"prompt": ["p"], "chosen": [assistant("a")], "rejected": [assistant("b")]},
            r"'prompt\[0\]' is not a message",
        ),
        (
            {"prompt": "p", "chosen": [{"role": "assistant", "content": [1]}], "rejected": [assistant("b")]},
            r"field 'chosen\[0\]\.content' is a list",
        ),
        (
            {"chosen": [user("p"), assistant("a")], "rejected": [user("q"), assistant("b")]},
            "'rejected' does not start with the messages",
        ),
        (
            {"prompt": "p", "chosen": "a", "rejected": "b", "short_prompt": [user("x"), assistant("y")]},
            r"short_prompt\[1\]\.role",
        ),
        (
            {"prompt": "p", "chosen": "a", "rejected": "b", "tools": [{"type": "function"}]},
            r"field 'tools' is \[\{'type': 'function'\}\], which a chat template may render .*; write it into",
        ),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "tools": '[{"type": "function"}]'}, r"field 'tools' is '\["),
        (
            {"prompt": "p", "chosen": "a", "rejected": "b", "chat_template_kwargs": {"enable_thinking": False}},
            r"field 'chat_template_kwargs' is \{'enable_thinking': False\}, which",
        ),
        (
            {"chosen": [user("p"), assistant("a") | {"reasoning_content": "hm"}], "rejected": [user("p")]},
            r"field 'chosen\[1\]\.reasoning_content' is 'hm', which .*; write it into a message's content, or remove",
        ),
        (
            {
                "prompt": [user("p"), {"role": "assistant", "content": "c", "tool_calls": [{"id": 1}]}, user("q")],
                "chosen": [assistant("a")],
                "rejected": [assistant("b")],
            },
            r"field 'prompt\[1\]\.tool_calls' is \[\{'id': 1\}\], which",
        ),
    ],
)
def test_unusable_rows_are_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(PairsError, match=rf"^some/where\.jsonl:3: .*{message}"):
        trl.parse(row, HERE)
