"""Generating from several prompts that begin alike: what they share is computed once.

    prompts            shared prefix P        | own end, padded on its left to the longest
    attention mask     1 1 1 1 1 1 1 1 1 1 1 1 | 0 0 1 1 1
    positions          0 1 2 … P-1            |     P P+1 …

For the turns of one document the prefix is the document, a hundred times as long as what follows it. The keys and
values of the prefix are computed in pieces, then repeated for the rows that are decoded together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: greedy at temperature 0, else from the nucleus, with a generator of its own."""

    temperature: float
    top_p: float
    seed: int


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    samplings: Sequence[Sampling],
    max_new_tokens: Sequence[int],
    stop_ids: frozenset[int],
    *,
    batch_size: int,
    prefill_tokens: int,
) -> list[list[int]]:
    """Replies to prompts, without the stop token that ends one.

    A row's tokens depend on all prompts of the call, by rounding: the same call gives the same tokens.

    Args:
        model: A causal model.
        prompts: Token ids, each at least one.
        samplings: For each prompt.
        max_new_tokens: For each prompt; a reply of this length was cut off.
        stop_ids: Tokens that end a reply.
        batch_size: Rows to decode together, each with a copy of the prefix's keys and values.
        prefill_tokens: Tokens of the prefix to compute at once.
    """
    shared = shared_tokens(prompts)
    prefix = _prefill(model, prompts[0][:shared], prefill_tokens)
    # A window counts places in the cache, and padding between the prefix and a row's end would shift it. Without a
    # prefix there is nothing that padding could attend to.
    rows_together = 1 if _has_window(model) or shared == 0 else batch_size
    replies: list[list[int]] = []
    for first in range(0, len(prompts), rows_together):
        rows = slice(first, first + rows_together)
        ends = [list(prompt[shared:]) for prompt in prompts[rows]]
        cache = _repeated(model, prefix, len(ends))
        replies += _decode(model, cache, shared, ends, samplings[rows], max_new_tokens[rows], stop_ids)
    return replies


def shared_tokens(prompts: Sequence[Sequence[int]]) -> int:
    """Leading tokens that all prompts share; one at least is left to each, since its logits are needed."""
    shortest = min(map(len, prompts))
    length = 0
    while length < shortest - 1 and len({prompt[length] for prompt in prompts}) == 1:
        length += 1
    return length


def _prefill(model: PreTrainedModel, tokens: Sequence[int], piece: int) -> DynamicCache:
    cache = DynamicCache()
    for first in range(0, len(tokens), piece):
        part = torch.tensor([tokens[first : first + piece]], device=model.device)
        positions = torch.arange(first, first + part.shape[1], device=model.device)[None]
        model(input_ids=part, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def _repeated(model: PreTrainedModel, prefix: DynamicCache, num_rows: int) -> DynamicCache:
    """A cache of its own for some rows, which starts with the prefix's keys and values."""
    cache = DynamicCache()
    for number, layer in enumerate(prefix.layers):
        keys, values = (tensor.expand(num_rows, -1, -1, -1) for tensor in (layer.keys, layer.values))
        cache.update(keys, values, number)
    return cache


def _decode(
    model: PreTrainedModel,
    cache: DynamicCache,
    shared: int,
    ends: list[list[int]],
    samplings: Sequence[Sampling],
    limits: Sequence[int],
    stop_ids: frozenset[int],
) -> list[list[int]]:
    device = model.device
    longest = max(map(len, ends))
    padding = torch.tensor([longest - len(end) for end in ends], device=device)
    inputs = torch.tensor([[0] * (longest - len(end)) + end for end in ends], device=device)
    place = torch.arange(longest, device=device)[None]
    mask = torch.cat([torch.ones(len(ends), shared, dtype=torch.long, device=device), place >= padding[:, None]], 1)
    positions = (shared + place - padding[:, None]).clamp(min=0)
    generators = [torch.Generator().manual_seed(sampling.seed) for sampling in samplings]
    replies: list[list[int]] = [[] for _ in ends]
    running = set(range(len(ends)))
    while True:
        logits = model(
            input_ids=inputs,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        logits = logits.float().cpu()
        next_tokens = [
            _next_token(row, sampling, generator)
            for row, sampling, generator in zip(logits, samplings, generators, strict=True)
        ]
        for row in sorted(running):
            if next_tokens[row] in stop_ids:
                running.discard(row)
                continue
            replies[row].append(next_tokens[row])
            if len(replies[row]) == limits[row]:
                running.discard(row)
        if not running:
            return replies
        inputs = torch.tensor(next_tokens, device=device)[:, None]
        mask = torch.cat([mask, mask.new_ones(len(ends), 1)], 1)
        positions = positions[:, -1:] + 1


def _next_token(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Greedy, or drawn from the fewest tokens whose probabilities add up to ``top_p``; ``logits`` is fp32 ``[V]``."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities, tokens = (logits / sampling.temperature).softmax(0).sort(descending=True)
    kept = probabilities.cumsum(0) - probabilities < sampling.top_p
    drawn = torch.multinomial(probabilities[kept], 1, generator=generator)
    return int(tokens[kept][drawn])


def _has_window(model: PreTrainedModel) -> bool:
    config = model.config
    return getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
