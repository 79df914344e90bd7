"""From a server's reply to an answer, or to the reason why it is none.

choices[0].message.content              the text
…reasoning, reasoning_content, <think>  thoughts: the run stops, they are no part of a pair
finish_reason  stop, eos_token, …, null the model ended the answer
               length                   cut at max_tokens
               abort, error, …          half an answer, of a server that is going down: asked again
               everything else          half an answer that would come again (content_filter): its turn is dropped
usage.prompt_tokens                     fewer than the text has: the server cuts prompts, the run stops
"""

from __future__ import annotations

from typing import Any

from datatrove.pipeline.inference.types import ServerError

from megatron_longpo.generation.engine import holds_thoughts
from megatron_longpo.generation.server_errors import AskAgain

_ENDED = {None, "", "stop", "eos_token", "stop_sequence"}  # the last two are TGI's
_INTERRUPTED = {"abort", "error", "cancelled", "timeout"}
"""vLLM and SGLang give these with HTTP 200 and what they have (vllm-project/vllm#57082)."""

_LEAST_SHARE = 0.9
"""Of a text's tokens that a server must have read. Templates strip blanks, and tokenizers differ a little."""


def read_reply(reply: dict[str, Any], url: str, prompt: str, text_tokens: int) -> dict[str, Any]:
    """A reply to a chat request in the form that datatrove reads, which wants fields that servers may leave out.

    Args:
        reply: What the server sent.
        url: Where it came from, for messages.
        prompt: The user's message.
        text_tokens: Tokens of the document or chunk in it, by ``--tokenizer-model``.

    Raises:
        AskAgain: The server did not finish the answer.
        ServerError: It speaks another protocol, thinks aloud, or does not read whole prompts.
    """
    match reply:
        case {"choices": [{"message": dict() as message} as choice, *_]}:
            text, usage = message.get("content"), reply.get("usage")
        case _:
            raise ServerError(f"{url}: the reply has no choices[0].message; is it an OpenAI-compatible server?")
    if not isinstance(text, str | None):
        raise ServerError(f"{url}: choices[0].message.content of the reply is no text, but {str(text)[:100]}")
    reason = choice.get("finish_reason")
    reason = reason if isinstance(reason, str | None) else str(reason)
    if reason in _INTERRUPTED:
        raise AskAgain(f"the server ended the answer early (finish_reason {reason})")
    if message.get("reasoning") or message.get("reasoning_content") or holds_thoughts(text or "", prompt):
        raise ServerError(
            f"{url}: the model writes down its thoughts, which are no part of a pair. Requests ask for none "
            '(chat_template_kwargs {"enable_thinking": false}), but this server or its chat template does not heed it: '
            "serve the model without a reasoning parser, and with a template that never thinks (vllm serve … "
            "--chat-template FILE), or serve a model that can do without"
        )
    usage = usage if isinstance(usage, dict) else {}
    counts = {name: count for name, count in usage.items() if isinstance(count, int)}
    _require_whole_prompt(counts.get("prompt_tokens", 0), text_tokens, url)
    return {
        "choices": [{"message": {"content": text}, "finish_reason": "stop" if reason in _ENDED else reason}],
        "usage": counts,
    }


def _require_whole_prompt(num_read: int, text_tokens: int, url: str) -> None:
    # Of OpenAI's protocol: prompt_tokens are all tokens of the prompt, those in the server's cache included.
    if 0 < num_read < _LEAST_SHARE * text_tokens:
        raise ServerError(
            f"{url}: the server read {num_read} tokens of a prompt whose text alone has {text_tokens}. Either it cuts "
            "long prompts: start it with room for them, and without --allow-auto-truncate (SGLang); or "
            "--tokenizer-model is another model's"
        )
