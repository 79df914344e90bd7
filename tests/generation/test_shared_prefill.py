"""The embedded engine: one prefill for several prompts gives what transformers' own generation gives for each."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from transformers import PreTrainedModel

from megatron_longpo.generation.shared_prefill import Sampling, _next_token, generate, shared_tokens
from tests.conversion.models import random_model

GREEDY = Sampling(0.0, 1.0, 0)


def prompts(shared: int, ends: Sequence[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)

    def tokens(length: int) -> list[int]:
        return torch.randint(0, 131, (length,), generator=generator).tolist()

    prefix = tokens(shared)
    # The first token behind the prefix is the prompt's number, so that the prefix ends where it should.
    return [[*prefix, number, *tokens(length - 1)] for number, length in enumerate(ends)]


def ours(model: PreTrainedModel, rows: list[list[int]], **changes: int) -> list[list[int]]:
    limits = {"batch_size": 4, "prefill_tokens": 7, **changes}
    return generate(model, rows, [GREEDY] * len(rows), [12] * len(rows), frozenset({3}), **limits)


@torch.inference_mode()
def theirs(model: PreTrainedModel, row: list[int]) -> list[int]:
    inputs = torch.tensor([row])
    new = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=3,
        pad_token_id=0,
    )[0, len(row) :].tolist()
    return new[: new.index(3)] if 3 in new else new


@pytest.mark.parametrize("name", ["mistral-v0.2", "qwen2.5", "llama3.1"])
@pytest.mark.parametrize("shared", [0, 1, 40])
def test_greedy_replies_are_those_of_transformers(name: str, shared: int) -> None:
    model = random_model(name).double()
    rows = prompts(shared, [5, 1, 9])
    assert shared_tokens(rows) == shared
    expected = [theirs(model, row) for row in rows]
    assert ours(model, rows) == expected
    assert ours(model, rows, batch_size=1) == ours(model, rows, batch_size=2) == expected


def test_rows_of_a_model_with_a_window_are_not_padded() -> None:
    model = random_model("mistral-v0.2", sliding_window=8).double()
    rows = prompts(20, [5, 1, 9])
    assert ours(model, rows) == [theirs(model, row) for row in rows]


def test_the_prefix_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("mistral-v0.2")
    counts: list[int] = []
    model.model.layers[0].register_forward_hook(
        lambda module, inputs, output: counts.append(inputs[0].shape[:2].numel())
    )
    ours(model, prompts(100, [3, 3, 3, 3]), batch_size=4)
    assert sum(counts) <= 100 + 4 * 3 + 4 * 12
    counts.clear()
    for row in prompts(100, [3, 3, 3, 3]):
        ours(model, [row])
    assert sum(counts) >= 4 * 100


def test_one_prompt_that_is_the_start_of_another_keeps_a_token_of_its_own() -> None:
    assert shared_tokens([[1, 2, 3], [1, 2, 3, 4]]) == 2
    assert shared_tokens([[1, 2, 3]]) == 2
    assert shared_tokens([[1], [1, 2]]) == 0


def test_sampling_depends_on_its_own_seed_alone() -> None:
    model = random_model("mistral-v0.2")
    rows = prompts(10, [4, 4, 4])

    def sampled(seeds: list[int]) -> list[list[int]]:
        samplings = [Sampling(0.7, 0.9, seed) for seed in seeds]
        return generate(model, rows, samplings, [12] * 3, frozenset(), batch_size=4, prefill_tokens=64)

    first = sampled([1, 2, 3])
    assert first == sampled([1, 2, 3])
    other = sampled([1, 9, 3])
    assert other[0] == first[0] and other[2] == first[2] and other[1] != first[1]


def test_the_nucleus_is_the_fewest_tokens_with_the_asked_probability() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    generator = torch.Generator().manual_seed(0)

    def drawn(temperature: float, top_p: float) -> set[int]:
        return {_next_token(logits, Sampling(temperature, top_p, 0), generator) for _ in range(300)}

    assert drawn(1.0, 1.0) == {0, 1, 2, 3}
    assert drawn(1.0, 0.9) == {0, 1, 2}
    assert drawn(1.0, 0.79) == {0, 1}
    assert drawn(1.0, 0.5) == {0}
    assert drawn(0.0, 1.0) == {0}
    counts = torch.bincount(torch.tensor([_next_token(logits, Sampling(1.0, 0.8, 0), generator) for _ in range(2000)]))
    assert counts[0] / 2000 == pytest.approx(0.5 / 0.8, abs=0.05)
