"""What requests ask of a server, and which of its replies are answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.generation import chat_server
from benchmarks.generation.chat_server import ChatServer, running
from megatron_longpo.generation.engine import Answer, EngineError, holds_thoughts
from megatron_longpo.generation.filters import AnswerFilter
from megatron_longpo.generation.output import PAIRS
from megatron_longpo.generation.server_replies import read_reply
from megatron_longpo.pairs import PreferenceDocument, read_pairs
from tests.generation.conftest import Settings
from tests.generation.runs import report, run

REFUSALS = {
    "repetition_penalty": "Unrecognized request argument supplied: repetition_penalty",
    "chat_template_kwargs": "chat_template is not supported for Mistral tokenizers.",
}


def test_what_a_server_would_add_is_said_in_every_request_where_it_is_known(settings: Settings) -> None:
    plain, strict = ChatServer(keep_prompts=True), ChatServer(not_known=REFUSALS)
    with running(plain) as url:
        expected = run(settings(base_url=url, max_documents=2))
    assert len(plain.payloads) > 12
    for payload in plain.payloads:
        assert payload["repetition_penalty"] == 1.0
        assert payload["chat_template_kwargs"] == {"enable_thinking": False}
        others = {"messages", "model", "max_tokens", "repetition_penalty", "chat_template_kwargs"}
        greedy = payload["temperature"] == 0
        assert payload.keys() - others == ({"temperature"} if greedy else {"temperature", "top_p", "seed"})
    with running(strict) as url:
        changes = {"max_documents": 2, "concurrency": 1, "max_retries": 0, "output": settings().output + "-strict"}
        assert run(settings(base_url=url, **changes)) == expected
    assert strict.num_refused == 2, "each field is refused once, then left out"


def test_an_answer_that_the_server_ended_is_no_answer(settings: Settings) -> None:
    with running(ChatServer()) as url:
        whole = run(settings(base_url=url, max_documents=4))
    with running(ChatServer(faults=("content_filter",), fault_every=7)) as url:
        chosen = settings(base_url=url, max_documents=4, output=settings().output + "-filtered")
        run(chosen)
    dropped = report(chosen)["turns"]["dropped"]
    assert {"chosen_content_filter", "rejected_content_filter"} & dropped.keys()
    for row in read_pairs(Path(chosen.output, PAIRS)):
        assert isinstance(row, PreferenceDocument)
        for turn in row.turns:
            assert turn.chosen.endswith("shows.") and turn.rejected.endswith("shows.")
    assert b"shows." in whole


def test_broken_off_counts_whatever_filters_are_on() -> None:
    url = "http://server"
    reply = {"choices": [{"message": {"content": "Half of"}, "finish_reason": "content_filter"}]}
    assert read_reply(reply, url, "", 0)["choices"][0]["finish_reason"] == "content_filter"
    for reason in (None, "stop", "eos_token", "stop_sequence", "length"):
        reply["choices"][0]["finish_reason"] = reason
        read = read_reply(reply, url, "", 0)["choices"][0]["finish_reason"]
        assert read == ("length" if reason == "length" else "stop")
    assert AnswerFilter((), 1.0).problem(Answer("Half of", False, broken_off="content_filter")) == "content_filter"


def test_a_server_that_cuts_prompts_stops_the_run_and_leaves_nothing_behind(settings: Settings) -> None:
    with running(ChatServer()) as url:
        expected = run(settings(base_url=url, max_documents=2))
    server = ChatServer(cut_chars=100)
    with running(server) as url:
        chosen = settings(base_url=url, max_documents=2, output=settings().output + "-cut")
        with pytest.raises(EngineError, match=r"the server read 100 tokens of a prompt whose text alone has \d{3,}\. "):
            run(chosen)
        server.cut_chars = None
        assert run(chosen) == expected, "the same command goes on, and no answer to a cut prompt was kept"


@pytest.mark.parametrize(
    "message",
    [
        {"content": "<think>\n1. Read the passage.\n2. Find questions."},
        {"content": "1. Read the passage.\n</think>\n\n1. Why did the king leave?"},
        {"content": "1. Why did the king leave?", "reasoning": "I read the passage."},
        {"content": None, "reasoning_content": "I read the passage."},
    ],
)
def test_thoughts_stop_the_run(message: dict[str, str], settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    reply = {"choices": [{"message": message, "finish_reason": "stop"}]}
    monkeypatch.setattr(chat_server, "_reply", lambda prompt, digest: reply)
    with (
        running(ChatServer()) as url,
        pytest.raises(EngineError, match=r"thoughts, which are no part .*thinking"),
    ):
        run(settings(base_url=url, max_documents=1))


def test_an_answer_may_quote_the_tag_of_thoughts() -> None:
    assert not holds_thoughts("It ends with </think>.", "A thought stands between <think> and </think>.")
    assert not holds_thoughts("It thinks.", "")
    assert holds_thoughts("\n<think>", "A thought stands between <think> and </think>.")


def test_fields_that_servers_leave_out() -> None:
    reply = json.loads('{"choices": [{"message": {"content": null}}], "usage": {"prompt_tokens": null}}')
    assert read_reply(reply, "http://server", "prompt", 100) == {
        "choices": [{"message": {"content": None}, "finish_reason": "stop"}],
        "usage": {},
    }
