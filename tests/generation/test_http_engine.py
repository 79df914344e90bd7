"""How a real HTTP server is asked, and what becomes of its refusals."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest

from benchmarks.generation import chat_server
from benchmarks.generation.chat_server import ChatServer, running
from megatron_longpo.generation import http_engine
from megatron_longpo.generation.engine import EngineError
from megatron_longpo.generation.output import PAIRS
from megatron_longpo.generation.runner import run_task
from tests.generation.conftest import NUM_DOCUMENTS, Settings
from tests.generation.runs import report, run


def test_requests_of_one_document_come_together(corpus: Path, settings: Settings) -> None:
    """So that a server's prefix cache still holds the document when its other turns come."""
    server = ChatServer(latency_s=0.002, keep_prompts=True)
    with running(server) as url:
        run(settings(base_url=url, concurrency=6))
    texts = {row["id"]: row["text"] for row in map(json.loads, corpus.read_text().splitlines())}
    places: dict[str, list[int]] = {}
    for place, prompt in enumerate(server.prompts):
        for id, text in texts.items():
            if prompt.startswith(text):
                places.setdefault(id, []).append(place)
    assert len(places) == NUM_DOCUMENTS
    # Neighbours but for what other connections squeeze in between.
    assert all(own[-1] - own[0] < len(own) + 6 for own in places.values())


def test_requests_in_flight_stay_at_the_limit_and_never_above(settings: Settings) -> None:
    server = ChatServer(latency_s=0.02)
    with running(server) as url:
        run(settings(base_url=url, concurrency=8))
    assert server.most_in_flight == 8


def test_retry_after_is_honoured(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_engine, "_FIRST_PAUSE_S", 0.01)
    server = ChatServer(faults=("429",), fault_every=10, retry_after_s=0.3)
    with running(server) as url:
        run(settings(base_url=url, max_documents=3))
    assert server.retries_after and min(server.retries_after) >= 0.3


def test_a_prompt_that_is_too_long_drops_its_document_with_the_reason(settings: Settings) -> None:
    server = ChatServer(context_chars=5000)  # chunks fit, documents do not
    with running(server) as url:
        chosen = settings(base_url=url, max_documents=3)
        with pytest.raises(ValueError, match=r"no document gave a pair(.|\n)*context length +3\n"):
            run(chosen)
        assert not Path(chosen.output, PAIRS).exists()
        asked = server.seen.total()
        run_task(chosen)
        assert server.seen.total() == asked, "a dropped document is finished work too"


def test_failed_documents_can_be_skipped(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_engine, "_FIRST_PAUSE_S", 0.01)
    server = ChatServer(faults=("500",), fault_every=40)
    with running(server) as url:
        chosen = settings(base_url=url, max_retries=0, skip_failed_documents=True)
        run(chosen)
    dropped = report(chosen)["documents"]["dropped"]
    assert 1 <= dropped["request_failed"] < NUM_DOCUMENTS


def test_whole_documents_go_to_a_server_of_their_own(corpus: Path, settings: Settings) -> None:
    servers = ChatServer(keep_prompts=True), ChatServer(keep_prompts=True)
    with running(servers[0]) as url, running(servers[1]) as long_url:
        run(settings(base_url=url, long_base_url=long_url, max_documents=2))
    texts = [row["text"] for row in map(json.loads, corpus.read_text().splitlines())]
    for server, is_long in zip(servers, (False, True), strict=True):
        assert server.prompts
        assert all(any(prompt.startswith(text) for text in texts) == is_long for prompt in server.prompts)


def test_a_server_that_is_not_there_is_said_before_anything_is_asked(settings: Settings) -> None:
    with pytest.raises(
        EngineError, match=r"v1/models: Client.*, also after asking 1 times; .* when the server is back$"
    ):
        run(settings(max_retries=0, skip_failed_documents=True))


def test_the_key_is_sent_and_never_shown(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    key = "sk-very-secret"
    with running(ChatServer(key=key)) as url:
        chosen = settings(base_url=url, max_documents=2)
        monkeypatch.setenv("OPENAI_API_KEY", key)
        run(chosen)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-another")
        wrong = settings(base_url=url, max_documents=2, output=chosen.output + "-wrong")
        with pytest.raises(
            EngineError, match=r"HTTP 401: invalid key Bearer …; set the environment variable OPENAI_API"
        ):
            run(wrong)
    written = [path.read_bytes() for path in Path(chosen.output).parent.rglob("*") if path.is_file()]
    assert not any(b"sk-" in content for content in written)
    assert "sk-" not in "".join(capfd.readouterr())


def test_of_many_that_fail_together_one_speaks(
    settings: Settings, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with running(ChatServer(key="secret")) as url, pytest.raises(EngineError, match="OPENAI_API_KEY"):
        run(settings(base_url=url, concurrency=4))
    gc.collect()  # what asyncio has to say of a task comes when it is collected
    assert [record.message for record in caplog.records if record.name == "asyncio"] == []


@pytest.mark.parametrize("usage", [{}, {"usage": None}, {"usage": {"prompt_tokens": None}}])
def test_what_servers_may_leave_out(
    usage: dict[str, object], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    reply = chat_server._reply

    def short(prompt: str, digest: str) -> dict[str, object]:
        return {"choices": [{"message": reply(prompt, digest)["choices"][0]["message"]}], **usage}

    monkeypatch.setattr(chat_server, "_reply", short)
    with running(ChatServer()) as url:
        chosen = settings(base_url=url, max_documents=1)
        run(chosen)
    assert report(chosen)["tokens"] == {"prompt": 0, "completion": 0}


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ([], "the reply has no choices"),
        (["text"], "the reply has no choices"),
        ([{"message": {"content": [{"type": "text"}]}}], r"content of the reply is no text, but \[\{'type'"),
    ],
)
def test_replies_of_other_protocols(
    choices: list[object], message: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_server, "_reply", lambda prompt, digest: {"choices": choices})
    with running(ChatServer()) as url, pytest.raises(EngineError, match=message):
        run(settings(base_url=url, max_documents=1))


def test_a_reply_that_is_no_object(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_server, "_reply", lambda prompt, digest: ["text"])
    with running(ChatServer()) as url, pytest.raises(EngineError, match=r"not a JSON object; is it an OpenAI-compat"):
        run(settings(base_url=url, max_documents=1))


def test_an_address_that_ends_too_early_is_found_at_the_first_request(settings: Settings) -> None:
    """Not before: some servers have no list of models."""
    with (
        running(ChatServer()) as url,
        pytest.raises(EngineError, match=r"completions: HTTP 404: .*; --base-url must end where /chat/completions"),
    ):
        run(settings(base_url=url.removesuffix("/v1"), max_documents=1))


def test_a_field_that_every_server_must_know_is_not_left_out(settings: Settings) -> None:
    server = ChatServer(not_known={"messages": "chat_template and messages do not go together"})
    with running(server) as url, pytest.raises(EngineError, match="HTTP 400: chat_template and messages do not go"):
        run(settings(base_url=url, max_documents=1))
    assert server.num_refused >= 1


def test_a_model_that_is_not_served(settings: Settings) -> None:
    with (
        running(ChatServer()) as url,
        pytest.raises(EngineError, match=r"does not serve --model other; it serves words"),
    ):
        run(settings(base_url=url, model="other"))
