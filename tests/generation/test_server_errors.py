"""What is read out of a server's errors."""

from __future__ import annotations

import json

import pytest

from megatron_longpo.generation.server_errors import error_text, is_too_long

TOO_LONG = {
    "vLLM": {"error": {"message": "This model's maximum context length is 8192 tokens. However, you requested 9000"}},
    "OpenAI": {"error": {"message": "Your input is over the limit.", "type": "x", "code": "context_length_exceeded"}},
    "SGLang": {
        "object": "error",
        "message": "Input length (160062 tokens) exceeds the maximum allowed length (59862 tokens). Use a",
        "code": 400,
    },
    "TensorRT-LLM": {
        "message": "The sum of prompt length (16500.0), query length (0) should not exceed max_num_tokens (8192)",
        "type": "BadRequestError",
    },
    "TensorRT-LLM, with the answer": {
        "message": "The sum of prompt length (9000.0), max_tokens (2048) should not exceed max_seq_len (10000)"
    },
    "llama.cpp": {"error": {"code": 400, "message": "request (16500 tokens) exceeds the available context size"}},
    "llama.cpp, by its type": {"error": {"code": 400, "message": "no room", "type": "exceed_context_size_error"}},
    "TGI": {"error": "Input validation error: `inputs` must have less than 4095 tokens. Given: 16500"},
    "TGI, with the answer": {
        "error": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. Given: 4000 and 2048",
        "error_type": "validation",
    },
}


@pytest.mark.parametrize("server", TOO_LONG)
def test_a_prompt_that_is_too_long_is_known_by_every_server_s_words(server: str) -> None:
    assert is_too_long(json.dumps(TOO_LONG[server]).encode())


@pytest.mark.parametrize("message", ["max_tokens must be at least 1", "invalid model", "temperature exceeds 2"])
def test_other_errors_stop_the_run(message: str) -> None:
    assert not is_too_long(json.dumps({"error": {"message": message, "type": "BadRequestError", "code": 400}}).encode())


def test_an_error_is_shown_in_one_line() -> None:
    assert error_text(b'{"error": {"message": "two\\n  lines"}}') == "two lines"
    assert error_text(b'{"detail": "Not Found"}') == "Not Found"
    assert error_text(b"<html>\nno JSON</html>") == "<html> no JSON</html>"
    assert len(error_text(b"x" * 1000)) == 300
