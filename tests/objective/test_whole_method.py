"""Rows of any shape, split over any number of ranks, against the method's definition on full sequences, in fp64.

A small transformer reads a row through shared-prefix attention and all that the data layer says of it, every
context-parallel rank its own part. The oracle reads every conversation as a sequence of its own, from its tokens and
spans alone; nothing of rows, padding or ranks is in it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from megatron_longpo.attention.shared_prefix import shared_prefix_attention
from megatron_longpo.config import ObjectiveConfig
from megatron_longpo.data.batch import collate
from megatron_longpo.data.document import Branch, TokenizedDocument
from megatron_longpo.data.layout import RowLayout
from megatron_longpo.data.predictions import Predictions, ReferenceTurns
from megatron_longpo.data.rows import OBJECTIVE_ROLES, training_row
from megatron_longpo.objective.logprobs import linear_logprobs
from megatron_longpo.objective.losses import objective_loss

VOCAB, HIDDEN, HEADS, HEAD_DIM = 23, 12, 2, 6
SCALE = 1 / math.sqrt(HEAD_DIM)
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Model:
    """Two layers of attention with one key/value head and RoPE; ``weights`` are its leaves."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        attention = [(HIDDEN, (HEADS + 2) * HEAD_DIM), (HEADS * HEAD_DIM, HIDDEN)]
        shapes = [(VOCAB, HIDDEN), (VOCAB, HIDDEN), *attention, *attention]
        self.weights = [torch.randn(s, generator=generator, dtype=torch.float64).mul_(0.5) for s in shapes]
        self.embedding, self.head, *self.layers = (weight.requires_grad_() for weight in self.weights)

    def hidden(self, tokens: torch.Tensor, positions: torch.Tensor, attention: Attention) -> torch.Tensor:
        x = self.embedding[tokens]
        for qkv, out in zip(self.layers[::2], self.layers[1::2], strict=True):
            q, k, v = (x @ qkv).view(len(x), -1, HEAD_DIM).split([HEADS, 1, 1], dim=1)
            context = attention(rotated(q, positions), rotated(k, positions), v)
            x = x + torch.tanh(context.flatten(1) @ out)
        return x


def rotated(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    angles = positions[:, None, None] * 0.3 ** torch.arange(HEAD_DIM // 2, dtype=torch.float64)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * angles.cos() - second * angles.sin(), first * angles.sin() + second * angles.cos()], -1)


def random_document(rng: random.Random) -> TokenizedDocument:
    """One to four turns; answers of one token, equal ones, and those that continue one another among them."""

    def tokens(low: int, high: int) -> list[int]:
        return [rng.randrange(VOCAB) for _ in range(rng.choice([low, rng.randint(low, high)]))]

    turns = range(rng.choice([1, 1, 2, 3, 4]))
    instructions, end = [tokens(0, 6) for _ in turns], tokens(0, 2)
    chosen = [tokens(1, 9) for _ in turns]
    rejected = [rng.choice([answer, [*answer, *tokens(1, 3)], answer[:1], tokens(1, 9)]) for answer in chosen]

    def pair(asked: Any) -> tuple[Branch, Branch]:
        branches = []
        for answers in (chosen, rejected):
            row: list[int] = []
            spans = []
            for turn in asked:
                start = len(row) + len(instructions[turn])
                row += instructions[turn] + answers[turn]
                spans.append((turn, start, len(row)))
            branches.append(Branch(np.array(row + end, dtype=np.int32), tuple(spans)))
        return branches[0], branches[1]

    independent = tuple(pair([turn]) for turn in turns)
    joint = independent[0] if len(turns) == 1 else pair(turns)
    return TokenizedDocument("random", np.array(tokens(1, 30), dtype=np.int32), joint, independent, ())


class RandomReference:
    """Log-probs for every answer's tokens."""

    def __init__(self, documents: list[TokenizedDocument], seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.turns: list[Any] = [
            [
                tuple(-3 * rng.random(len(branch.response(turn)), dtype=np.float32) for branch in pair)
                for turn, pair in enumerate(document.independent)
            ]
            for document in documents
        ]

    def of(self, number: int) -> ReferenceTurns:
        return self.turns[number]


def by_definition(
    model: Model, config: ObjectiveConfig, document: TokenizedDocument, reference: ReferenceTurns, window: int | None
) -> torch.Tensor:
    """The loss of one document: Eq. 11-14 and the baselines, conversation by conversation."""

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        back = torch.arange(len(q))[:, None] - torch.arange(len(q))
        unseen = (back < 0) | (back >= (window or len(q)))
        scores = torch.einsum("qnd,kd->nqk", q, k[:, 0]) * SCALE
        return torch.einsum("nqk,kd->qnd", scores.masked_fill(unseen, -torch.inf).softmax(-1), v[:, 0])

    answers: list[dict[int, torch.Tensor]] = [{}, {}]
    nll: list[list[torch.Tensor]] = [[], []]
    for pair in (document.joint,) if config.turns == "joint" else document.independent:
        assert pair is not None
        for role, branch in enumerate(pair):
            tokens = torch.tensor([*document.document_tokens.tolist(), *branch.tokens.tolist()])
            logits = model.hidden(tokens, torch.arange(len(tokens)), attention) @ model.head.t()
            logps = logits.log_softmax(-1)[:-1].gather(1, tokens[1:, None])[:, 0]
            nll[role].append(-logps.mean())
            first = len(document.document_tokens) - 1
            answers[role] |= {turn: logps[first + start : first + stop] for turn, start, stop in branch.spans}
    ratios = [[answers[r][t] - torch.from_numpy(reference[t][r]) for t in range(len(reference))] for r in (0, 1)]
    if config.objective.startswith("sft-") and config.objective != "sft-chosen-constraint":
        return torch.stack(nll[config.objective == "sft-rejected"]).mean()
    anchored = config.nll_weight * torch.stack(nll[0]).mean()
    if config.objective == "sft-chosen-constraint":
        return anchored + config.beta * sum((torch.exp(-ratio) - 1 + ratio).sum() for ratio in ratios[0])
    margins = torch.stack([config.beta * (c.sum() - r.sum()) for c, r in zip(*ratios, strict=True)])
    preference = -logsigmoid(margins.sum() if config.turn_reduction == "sum" else margins).mean()
    return config.preference_weight * preference + anchored


def of_all_ranks(parts: list[Predictions]) -> Predictions:
    """Every rank's predictions behind one another."""
    names = [f.name for f in fields(Predictions) if f.name not in ("num_documents", "max_turns", "turn_mask")]
    joined: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    return replace(parts[0], **joined)


@pytest.mark.slow
@pytest.mark.parametrize("first_seed", [0, 60, 120])
def test_rows_of_any_shape_equal_the_definition(first_seed: int) -> None:
    for seed in range(first_seed, first_seed + 60):
        rng = random.Random(seed)
        documents = [random_document(rng) for _ in range(rng.choice([1, 1, 2, 3]))]
        config = ObjectiveConfig(
            objective=rng.choice([*OBJECTIVE_ROLES, "longpo"]),
            turns=rng.choice(["joint", "independent"]),
            turn_reduction=rng.choice(["sum", "mean"]),
            beta=rng.choice([0.1, 1.0, 3.0]),
            preference_weight=rng.choice([0.0, 0.01, 1.0]),
            nll_weight=rng.choice([0.0, 0.3, 1.0]),
        )
        cp_size, tp_size, window = rng.randint(1, 8), rng.randint(1, 4), rng.choice([None, 1, 2, rng.randint(3, 40)])
        reference, model = RandomReference(documents, seed), Model()
        roles = OBJECTIVE_ROLES[config.objective]
        rows = [training_row(document, config.turns, roles, n) for n, document in enumerate(documents)]
        batches = [
            collate(rows, objective=config, cp_size=cp_size, cp_rank=rank, row_multiple=cp_size * tp_size,
                    reference=reference)
            for rank in range(cp_size)
        ]  # fmt: skip
        layout = RowLayout.from_tensor(batches[0].layout.to_tensor(), window)
        tokens, positions = (
            torch.cat([getattr(batch, name) for batch in batches])[layout.gathered_index()]
            for name in ("tokens", "position_ids")
        )
        hidden = model.hidden(
            tokens, positions, lambda q, k, v, row=layout: shared_prefix_attention(q, k, v, row, SCALE)
        )
        parts = [batch.predictions for batch in batches]
        logps = [
            linear_logprobs(
                hidden[layout.local_index(r)],
                model.head,
                p.source_index,
                p.targets,
                vocab_size=len(model.head),
                chunk_tokens=7,
            )
            for r, p in enumerate(parts)
        ]
        losses, _ = objective_loss(config, torch.cat(logps), of_all_ranks(parts))
        expected = torch.stack(
            [by_definition(model, config, d, reference.of(n), window) for n, d in enumerate(documents)]
        )
        about = f"seed {seed}"
        # Weights of predictions are stored in fp32.
        torch.testing.assert_close(losses, expected, rtol=2e-7, atol=2e-7, msg=lambda text, a=about: f"{a}: {text}")
        weights = torch.arange(1.0, len(documents) + 1, dtype=torch.float64)
        ours, theirs = (
            torch.autograd.grad((loss * weights).sum(), model.weights, materialize_grads=True, allow_unused=True)
            for loss in (losses, expected)
        )
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-7, atol=1e-6, msg=lambda text, a=about: f"{a}: {text}")
