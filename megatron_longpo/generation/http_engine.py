"""Asking a server that speaks OpenAI's chat protocol (vLLM, SGLang, TensorRT-LLM), and surviving what servers do.

    server down, connection cut, answer cut short, timeout, 408, 409, 429, 5xx   asked again, after a growing pause
    prompt longer than the server's context                                      the document is dropped, and counted
    a field of ours that only some servers know                                  asked again without it
    401, 403, 404, every other 4xx                                               the run stops: a flag is wrong

A pause grows from half a second to a minute, is spread at random so that requests do not come back in step, and is at
least what the server asks for with Retry-After. When ``--max-retries`` are used up the run stops, and goes on from
there when it is started again; with ``--skip-failed-documents`` it drops the document instead.
"""

from __future__ import annotations

import asyncio
import io
import os
import random
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import aiohttp
import orjson
from datatrove.pipeline.inference.types import ServerError
from loguru import logger

from megatron_longpo.generation.refusals import refusal
from megatron_longpo.generation.server_errors import API_KEY, AskAgain, advice, error_text, is_too_long, retry_after_s
from megatron_longpo.generation.server_replies import read_reply
from megatron_longpo.generation.settings import GenerationSettings

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 60.0
_CONNECT_TIMEOUT_S = 30.0
_TRY_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}
_NOT_KNOWN_BY_ALL = {"repetition_penalty": "repetition_penalty", "chat_template_kwargs": "chat_template"}
"""Fields of a request that are not OpenAI's, and the word by which a server that refuses one names it: vLLM refuses
``chat_template_kwargs`` as "chat_template" for Mistral's own tokenizers, whose models never think."""


class HttpEngine:
    """A connection pool to one server, or to two: one for chunks, one for whole documents."""

    def __init__(self, settings: GenerationSettings) -> None:
        assert settings.base_url is not None
        self._settings = settings
        self._urls = [url.rstrip("/") for url in (settings.base_url, settings.long_base_url or settings.base_url)]
        self._key = os.environ.get(API_KEY)
        self._session: aiohttp.ClientSession | None = None
        self._unknown: dict[str, set[str]] = {}  # by address: fields that the server has refused

    async def __aenter__(self) -> HttpEngine:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        self._session = aiohttp.ClientSession(
            # datatrove's semaphore limits the requests in flight.
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=self._settings.request_timeout_s, sock_connect=_CONNECT_TIMEOUT_S),
            headers=headers,
        )
        try:
            for url in dict.fromkeys(self._urls):
                await self._require_model(url)
        except BaseException:
            await self._session.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._session is not None
        await self._session.close()

    async def make_request(self, payload: dict[str, Any]) -> dict[str, Any]:
        """The server's reply to a chat request.

        Raises:
            InferenceError: The prompt is too long for the server, or failed documents are skipped.
            ServerError: The server cannot answer anything.
        """
        payload = dict(payload)
        url = f"{self._urls[payload.pop('whole_document', False)]}/chat/completions"
        text_tokens = payload.pop("text_tokens", 0)
        prompt = payload["messages"][-1]["content"]
        unknown = self._unknown.setdefault(url, set())
        while True:
            sent = {name: value for name, value in payload.items() if name not in unknown}
            ask = partial(self._ask, url, orjson.dumps(sent), prompt, text_tokens)
            try:
                return await self._persistently(url, ask, is_chat=True)
            except _Refused as error:
                said = str(error.error)
                refused = {name for name, word in _NOT_KNOWN_BY_ALL.items() if name in sent and word in said}
                if not refused:
                    raise
                if refused - unknown:
                    logger.warning(f"{said}; going on without {', '.join(sorted(refused))} in requests")
                unknown |= refused

    async def _require_model(self, url: str) -> None:
        """Fail early where the server is not there or does not serve the model."""
        ask = partial(self._once, "GET", f"{url}/models", None)
        reply = await self._persistently(f"{url}/models", ask, is_chat=False)
        models = reply["data"] if isinstance(reply.get("data"), list) else []
        names = [str(model.get("id")) for model in models if isinstance(model, dict)]
        if names and self._settings.model not in names:
            raise ServerError(f"{url} does not serve --model {self._settings.model}; it serves {', '.join(names)}")

    async def _persistently(
        self, url: str, ask: Callable[[], Awaitable[dict[str, Any]]], *, is_chat: bool
    ) -> dict[str, Any]:
        """What ``ask`` gives, which is called again, after a pause, as long as there is hope."""
        for attempt in range(self._settings.max_retries + 1):
            problem, at_least_s = "", 0.0
            try:
                return await ask()
            except AskAgain as error:
                problem, at_least_s = str(error), error.after_s
            except TimeoutError:
                problem = f"no reply within {self._settings.request_timeout_s:g} s (--request-timeout-s)"
            except (aiohttp.ClientError, OSError) as error:
                problem = self._hidden(f"{type(error).__name__}: {error}")
            if attempt < self._settings.max_retries:
                spread = random.uniform(0.5, 1.5)  # when a request is sent again changes no answer
                pause_s = max(min(_FIRST_PAUSE_S * 2**attempt, _LONGEST_PAUSE_S) * spread, at_least_s)
                logger.warning(f"{url}: {problem}; asking again in {pause_s:.1f} s")
                await asyncio.sleep(pause_s)
        tries = f"{url}: {problem}, also after asking {self._settings.max_retries + 1} times"
        if self._settings.skip_failed_documents and is_chat:
            raise refusal("request_failed", tries)
        raise ServerError(
            f"{tries}; what has been answered is kept: start the same command again when the server is back"
            + (", or with --skip-failed-documents" if is_chat else "")
        )

    async def _ask(self, url: str, body: bytes, prompt: str, text_tokens: int) -> dict[str, Any]:
        return read_reply(await self._once("POST", url, body), url, prompt, text_tokens)

    async def _once(self, method: str, url: str, body: bytes | None) -> dict[str, Any]:
        assert self._session is not None
        # As a stream: aiohttp warns of large bodies that are plain bytes, and a document has a megabyte.
        data = io.BytesIO(body) if body is not None else None
        async with self._session.request(method, url, data=data) as response:
            content = await response.read()
            if response.status == 200:
                try:
                    reply = orjson.loads(content)
                except orjson.JSONDecodeError as error:
                    raise AskAgain(f"the reply is not JSON ({error})") from error
                if not isinstance(reply, dict):
                    raise ServerError(f"{url}: the reply is not a JSON object; is it an OpenAI-compatible server?")
                return reply
            message = self._hidden(error_text(content))
            if response.status in _TRY_AGAIN:
                raise AskAgain(f"HTTP {response.status}: {message}", retry_after_s(response.headers))
            if response.status in (400, 413, 422) and body is not None and is_too_long(content):
                raise refusal("context_length", message)
            if response.status == 404 and body is None:
                return {}  # a server without a list of models
            problem = f"{url}: HTTP {response.status}: {message}{advice(response.status)}"
            raise _Refused(problem) if response.status in (400, 422) else ServerError(problem)

    def _hidden(self, text: str) -> str:
        """Without the key, which some servers repeat."""
        return text.replace(self._key, "…") if self._key else text


class _Refused(ServerError):
    """The server does not take this request, perhaps because of a field in it."""
