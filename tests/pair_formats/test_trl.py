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
    ],
)
def test_unusable_rows_are_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(PairsError, match=rf"^some/where\.jsonl:3: .*{message}"):
        trl.parse(row, HERE)
