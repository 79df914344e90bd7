"""A real HTTP server that speaks the chat protocol and answers from the words of the prompt, with faults on demand.

    python -m benchmarks.generation.chat_server --latency-ms 50

It prints its address. Its answers depend on the prompt alone, so that two runs can be compared byte by byte. It stands
in for a model in the benchmark of the pipeline's own cost and in the tests of what the pipeline survives; it says
nothing about quality.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from megatron_longpo.help_format import HelpFormatter, number_at_least_0

MODEL = "words"

_HANG_S = 30.0
_HALVES = ("abort", "cancelled", "content_filter")
_WORDS = re.compile(r"[A-Za-z]{3,}")


@dataclass
class ChatServer:
    """What the server does and what it has seen.

    Args:
        model: The name that it is served under.
        latency_s: Time that every answer takes.
        faults: Given to the requests in turn, each prompt's first request only, so that asking again helps: ``429``
            and other statuses; ``cut``, a connection cut within the body; ``garbage``, a body that is not JSON;
            ``hang``, no reply; ``refuse``, a connection closed at once; ``abort`` and other ``finish_reason``s, half of
            the answer.
        fault_every: One request in so many gets a fault.
        context_chars: Longer prompts get the error of a too long context.
        cut_chars: Longer prompts are cut to this, without an error.
        not_known: Fields that requests must not have, and the message of the error that they get.
        retry_after_s: Sent with 429.
        key: Requests without this key get 401.
        down_after: After so many answers every connection is closed at once, until it is None again.
    """

    model: str = MODEL
    latency_s: float = 0.0
    faults: tuple[str, ...] = ()
    fault_every: int = 3
    context_chars: int | None = None
    cut_chars: int | None = None
    not_known: dict[str, str] = field(default_factory=dict)
    retry_after_s: float | None = None
    key: str | None = None
    down_after: int | None = None
    seen: Counter[str] = field(default_factory=Counter)
    answered: Counter[str] = field(default_factory=Counter)
    prompts: list[str] = field(default_factory=list)
    payloads: list[dict[str, Any]] = field(default_factory=list)
    retries_after: list[float] = field(default_factory=list)
    num_refused: int = 0
    in_flight: int = 0
    most_in_flight: int = 0
    keep_prompts: bool = False
    first_s: float = 0.0
    last_s: float = 0.0
    busy_s: float = 0.0
    _first_seen: dict[str, float] = field(default_factory=dict)

    def application(self) -> web.Application:
        """The routes."""
        app = web.Application(client_max_size=1 << 30)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/occupation", self._occupation)
        app.router.add_post("/v1/chat/completions", self._chat)
        return app

    async def _models(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"object": "list", "data": [{"id": self.model}]})

    async def _occupation(self, request: web.Request) -> web.StreamResponse:
        """How many requests it had in work, on average from its first to its last."""
        seconds = self.last_s - self.first_s
        answered = self.answered.total()
        return web.json_response({"answered": answered, "seconds": seconds, "mean": self.busy_s / seconds})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        payload = json.loads(await request.read())
        for name in self.not_known:
            if name in payload:
                self.num_refused += 1
                return web.json_response({"error": {"message": self.not_known[name]}}, status=400)
        prompt = payload["messages"][-1]["content"]
        # A pool of the same chunk is asked for again with another seed.
        digest = hashlib.sha256(f"{prompt}{payload.get('seed')}".encode()).hexdigest()
        if self.down_after is not None and self.answered.total() >= self.down_after:
            return await self._fail(request, "refuse")
        number = self.seen.total()
        self.seen[digest] += 1
        if self.keep_prompts and self.seen[digest] == 1:
            self.prompts.append(prompt)
            self.payloads.append(payload)
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            message = f"invalid key {request.headers.get('Authorization')}"
            return web.json_response({"error": {"message": message}}, status=401)
        if self.context_chars is not None and len(prompt) > self.context_chars:
            message = f"This model's maximum context length is {self.context_chars} characters"
            return web.json_response({"error": {"message": message}}, status=400)
        now = asyncio.get_running_loop().time()
        if self.seen[digest] == 1:
            self._first_seen[digest] = now
        else:
            self.retries_after.append(now - self._first_seen[digest])
        if self.faults and number % self.fault_every == 0 and self.seen[digest] == 1:
            fault = self.faults[number // self.fault_every % len(self.faults)]
            if fault in _HALVES:
                return web.json_response(_half(_reply(prompt, digest), fault))
            return await self._fail(request, fault)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        self.first_s = self.first_s or now
        await asyncio.sleep(self.latency_s)
        self.in_flight -= 1
        self.answered[digest] += 1
        self.last_s = asyncio.get_running_loop().time()
        self.busy_s += self.last_s - now
        return web.json_response(_reply(prompt[: self.cut_chars], digest))

    async def _fail(self, request: web.Request, fault: str) -> web.StreamResponse:
        if fault.isdigit():
            headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
            return web.json_response({"error": {"message": "too busy"}}, status=int(fault), headers=headers)
        if fault == "hang":
            await asyncio.sleep(_HANG_S)
        if fault == "garbage":
            return web.Response(text='{"choices": [{"mess', content_type="application/json")
        assert request.transport is not None
        if fault == "cut":
            response = web.StreamResponse(headers={"Content-Length": "1000"})
            await response.prepare(request)
            await response.write(b'{"choices": [')
            await asyncio.sleep(0.01)
        request.transport.close()
        return web.Response()


def _reply(prompt: str, digest: str) -> dict[str, Any]:
    """A reply made of the prompt's own words, drawn by its hash."""
    words = list(dict.fromkeys(_WORDS.findall(prompt[:20000]))) or ["nothing"]
    chosen = [words[int(digest[i : i + 4], 16) % len(words)] for i in range(0, 48, 4)]
    if "numbered list" in prompt:
        topics = (" and ".join(chosen[i : i + 3]) for i in range(0, 12, 3))
        text = "\n".join(f"{number}. Explain how {topic} belong together." for number, topic in enumerate(topics, 1))
    else:
        text = (
            f"The text speaks of {chosen[0]} and of {chosen[1]}. It says that the {chosen[2]} comes before any "
            f"{chosen[3]}, while {chosen[4]} is left to the {chosen[5]} of the reader, as the {chosen[6]} shows."
        )
    # A tokenizer of characters: no other one counts more.
    usage = {"prompt_tokens": len(prompt), "completion_tokens": len(text)}
    message = {"role": "assistant", "content": text}
    return {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": usage}


def _half(reply: dict[str, Any], reason: str) -> dict[str, Any]:
    """The reply of a server that ended early."""
    choice = reply["choices"][0]
    choice["message"]["content"] = choice["message"]["content"][: len(choice["message"]["content"]) // 2]
    choice["finish_reason"] = reason
    return reply


@contextmanager
def running(server: ChatServer, port: int = 0) -> Iterator[str]:
    """Serve from a thread while the block runs; gives the address for ``--base-url``."""
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(server.application(), access_log=None, shutdown_timeout=0.1)

    async def start() -> str:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        return f"http://127.0.0.1:{runner.addresses[0][1]}/v1"

    async def stop() -> None:
        await runner.cleanup()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def main() -> None:
    """Serve until stopped."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.generation.chat_server",
        description=__doc__,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--latency-ms", type=number_at_least_0, default=50.0, metavar="MS", help="time of every answer")
    parser.add_argument("--port", type=int, default=0, metavar="N", help="0 takes a free one")
    parser.add_argument("--model", default=MODEL, metavar="NAME", help="name of the model")
    arguments = parser.parse_args()
    with running(ChatServer(arguments.model, arguments.latency_ms / 1000), arguments.port) as address:
        print(address, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
