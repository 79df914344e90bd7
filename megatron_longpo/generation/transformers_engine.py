"""The embedded engine: a Hugging Face model in this process, on a GPU or a CPU.

It answers the requests of one document and step in one call, so that its answers depend on the document alone, not on
which documents happen to be in flight.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from datatrove.pipeline.inference.types import ServerError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_longpo.data.encoding import SharedPrefixEncoder
from megatron_longpo.generation.engine import Answer, Request, holds_thoughts
from megatron_longpo.generation.model_files import model_folder, run_tokenizer
from megatron_longpo.generation.refusals import refusal
from megatron_longpo.generation.settings import GenerationSettings
from megatron_longpo.generation.shared_prefill import Sampling, generate

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TransformersEngine:
    """Loads the model when it is entered."""

    def __init__(self, settings: GenerationSettings) -> None:
        self._settings = settings
        self._model: PreTrainedModel | None = None
        self._rotary: dict[bool, torch.nn.Module] = {}

    async def __aenter__(self) -> TransformersEngine:
        await asyncio.to_thread(self._load)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._model = None

    async def make_request(self, payload: dict[str, Any]) -> dict[str, Any]:
        """Answers the requests of a document, in the form of a server's reply.

        Raises:
            InferenceError: A prompt is longer than the model's positions.
            ServerError: The model writes down its thoughts.
        """
        requests = [Request(**request) for request in payload["requests"]]
        answers = await asyncio.to_thread(self.answer, requests)
        if any(holds_thoughts(answer.text, request.prompt) for answer, request in zip(answers, requests, strict=True)):
            raise ServerError(
                f"--model {self._settings.model} writes down its thoughts, which are no part of a pair, though its "
                "chat template was told enable_thinking false: give --chat-template FILE with one that ends in an "
                "empty thought, or another model"
            )
        usage = {
            "answers": [asdict(answer) for answer in answers],
            "prompt_tokens": sum(answer.num_prompt_tokens for answer in answers),
            "completion_tokens": sum(answer.num_completion_tokens for answer in answers),
        }
        return {"choices": [{"message": {"content": ""}, "finish_reason": "stop"}], "usage": usage}

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """The answers; all requests are about chunks or all about a whole document."""
        assert self._model is not None
        prompts = [self._encode(request.prompt) for request in requests]
        self._require_positions(prompts, requests)
        self._model.model.rotary_emb = self._rotary[requests[0].whole_document]
        replies = generate(
            self._model,
            prompts,
            [Sampling(request.temperature, request.top_p, request.seed) for request in requests],
            [request.max_tokens for request in requests],
            self._stop_ids,
            batch_size=self._settings.batch_size,
            prefill_tokens=self._settings.prefill_tokens,
        )
        return [
            Answer(
                self._tokenizer.decode(reply, special=False), len(reply) == request.max_tokens, len(prompt), len(reply)
            )
            for request, prompt, reply in zip(requests, prompts, replies, strict=True)
        ]

    def _load(self) -> None:
        settings = self._settings
        folder = model_folder(settings)
        # cuDNN's attention prepares itself for every length anew, which here are all, and text that it generated on
        # Blackwell was corrupt (pytorch/pytorch#193893).
        torch.backends.cuda.enable_cudnn_sdp(False)
        device = _device(settings.device)
        tokenizer = run_tokenizer(settings)
        self._tokenizer = tokenizer
        self._encoder = SharedPrefixEncoder(tokenizer)
        try:
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=DTYPES[settings.dtype] if settings.dtype else "auto", local_files_only=True
            )
        except SafetensorError as error:
            raise ValueError(f"--model {folder}: its weights cannot be read ({error}); download them again") from error
        self._model = model.to(device).eval()
        stop = model.generation_config.eos_token_id
        self._stop_ids = frozenset([tokenizer.eos_id, *(stop if isinstance(stop, list) else [stop])]) - {None}
        self._rotary = {False: _rotary(self._model), True: _rotary(self._model, settings.long_rotary_base)}

    def _encode(self, prompt: str) -> list[int]:
        # The switch of Qwen3's template and others like it; servers get it in every request.
        text = self._tokenizer.render(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, enable_thinking=False
        )
        return [int(token) for token in self._encoder.encode(text)[0]]

    def _require_positions(self, prompts: Sequence[Sequence[int]], requests: Sequence[Request]) -> None:
        assert self._model is not None
        limit = self._model.config.max_position_embeddings
        longest = max(len(prompt) for prompt in prompts)
        # A model is asked about whole documents beyond its length too: that it is worse there is the point.
        if longest > limit and not requests[0].whole_document:
            raise refusal("context_length", f"a prompt has {longest} tokens, the model {limit} positions")


def _device(name: str | None) -> torch.device:
    if name is None:
        from megatron_longpo.platform import device

        return device()
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # the latter from a torch that was built without CUDA
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device {name} cannot be used ({reason}): give another, or leave it out") from error


def _rotary(model: PreTrainedModel, base: float | None = None) -> torch.nn.Module:
    """The model's rotary embedding, or one with another base.

    Raises:
        ValueError: The model has none of the usual form.
    """
    own = getattr(getattr(model, "model", None), "rotary_emb", None)
    if base is None and own is not None:
        return own
    if own is None:
        raise ValueError(f"--engine transformers does not know the rotary embedding of {type(model).__name__}")
    config = copy.deepcopy(model.config)
    parameters = getattr(config, "rope_parameters", None)
    if parameters is not None:
        parameters["rope_theta"] = base
    else:  # transformers 4
        config.rope_theta = base
    return type(own)(config=config).to(model.device)
