"""Predictions of made-up documents, and the paper's equations on them written out by hand, token by token."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from megatron_longpo.config import ObjectiveConfig
from megatron_longpo.data.predictions import Predictions


@dataclass
class Turn:
    """Places of a turn's predictions among the K of the batch."""

    chosen: list[int]
    rejected: list[int]


@dataclass
class Document:
    """A document's predictions: those of the shared prefix, of what lies between answers, and of its turns."""

    prefix: list[int]
    between: list[list[int]]  # by turn: the NLL sequence's tokens in front of the turn's answer
    turns: list[Turn]


@dataclass
class Case:
    """A micro-batch, its predictions and log-probs."""

    documents: list[Document]
    predictions: Predictions
    logps: torch.Tensor = field(repr=False)


def make_case(
    config: ObjectiveConfig, num_turns: tuple[int, ...] = (1, 2, 3, 4), dtype: torch.dtype = torch.float64
) -> Case:
    """Documents of the given numbers of turns, with random lengths and log-probs.

    The predictions that the objective does not need are left out as the data layer leaves them out, and they come in
    a random order, since nothing promises one to the loss.
    """
    generator = torch.Generator().manual_seed(len(num_turns))
    nll_role = 1 if config.objective == "sft-rejected" else 0
    with_nll = config.has_nll
    rows: list[tuple[int, int, float, bool]] = []  # document, slot, weight, has a reference

    def length(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    def add(count: int, document: int, slot: int, weight: float) -> list[int]:
        rows.extend([(document, slot, weight, slot >= 0)] * count)
        return list(range(len(rows) - count, len(rows)))

    documents = []
    for number, turns in enumerate(num_turns):
        prefix = length(5, 30)
        answers = [(length(1, 7), length(1, 7)) for _ in range(turns)]
        between = [length(0, 4) for _ in range(turns)]
        nll_tokens = [between[t] + answers[t][nll_role] for t in range(turns)]
        if config.turns == "joint":
            prefix_weight = 1 / (prefix + sum(nll_tokens))
            weights = [prefix_weight] * turns
        else:
            weights = [1 / (turns * (prefix + tokens)) for tokens in nll_tokens]
            prefix_weight = sum(weights)
        document = Document(add(prefix if with_nll else 0, number, -1, prefix_weight), [], [])
        for turn in range(turns):
            slot = (number * max(num_turns) + turn) * 2
            weight = weights[turn] if with_nll else 0.0
            document.between.append(add(between[turn] if with_nll else 0, number, -1, weight))
            roles = [
                add(answers[turn][role], number, slot + role, weight if role == nll_role else 0.0) for role in (0, 1)
            ]
            document.turns.append(Turn(*roles))
        documents.append(document)
    order = torch.randperm(len(rows), generator=generator)
    place = torch.argsort(order).tolist()
    for document in documents:
        document.prefix = [place[k] for k in document.prefix]
        document.between = [[place[k] for k in tokens] for tokens in document.between]
        document.turns = [Turn([place[k] for k in t.chosen], [place[k] for k in t.rejected]) for t in document.turns]
    columns = list(zip(*(rows[k] for k in order.tolist()), strict=True))
    has_reference = torch.tensor(columns[3])
    logps, reference = -3 * torch.rand(2, len(rows), dtype=torch.float64, generator=generator)
    predictions = Predictions(
        source_index=torch.arange(len(rows)),
        targets=torch.zeros(len(rows), dtype=torch.int64),
        nll_weight=torch.tensor(columns[2], dtype=dtype),
        document_index=torch.tensor(columns[0]),
        response_slot=torch.tensor(columns[1]),
        reference_logps=(reference * has_reference).to(dtype),
        num_documents=len(num_turns),
        max_turns=max(num_turns),
        turn_mask=torch.arange(max(num_turns)) < torch.tensor(num_turns)[:, None],
    )
    return Case(documents, predictions, logps.to(dtype))


def take(predictions: Predictions, index: torch.Tensor) -> Predictions:
    """Some of the predictions, as a context-parallel rank has them."""
    per_prediction: dict[str, Any] = {
        f.name: getattr(predictions, f.name)[index]
        for f in fields(predictions)
        if f.name not in ("num_documents", "max_turns", "turn_mask")
    }
    return replace(predictions, **per_prediction)


def by_hand(config: ObjectiveConfig, case: Case, logps: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss ``[D]`` and metrics ``[D]`` straight from the equations, one document, turn and token at a time."""
    reference = case.predictions.reference_logps
    losses: list[torch.Tensor] = []
    metrics: dict[str, list[torch.Tensor]] = {}

    def note(**values: torch.Tensor) -> None:
        for name, value in values.items():
            metrics.setdefault(name.replace("__", "/"), []).append(value.detach())

    for document in case.documents:
        answers = [t.rejected if config.objective == "sft-rejected" else t.chosen for t in document.turns]
        conversations = [document.between[t] + answers[t] for t in range(len(answers))]
        if config.turns == "joint":
            nll = -logps[[*document.prefix, *itertools.chain(*conversations)]].mean()
        else:
            nll = -torch.stack([logps[document.prefix + tokens].mean() for tokens in conversations]).mean()
        anchored = config.nll_weight * nll if config.has_nll else 0.0  # else nothing of the document is predicted
        chosen = [logps[t.chosen].sum() for t in document.turns]
        rejected = [logps[t.rejected].sum() for t in document.turns]
        if config.objective in ("longpo", "dpo"):
            reward_chosen = [config.beta * (logps[t.chosen] - reference[t.chosen]).sum() for t in document.turns]
            reward_rejected = [config.beta * (logps[t.rejected] - reference[t.rejected]).sum() for t in document.turns]
            if config.turn_reduction == "sum":
                margin = sum(reward_chosen) - sum(reward_rejected)
                preference = -torch.log(torch.sigmoid(margin))
                accuracy = (margin > 0).double()
            else:
                margins = [c - r for c, r in zip(reward_chosen, reward_rejected, strict=True)]
                preference = -torch.stack([torch.log(torch.sigmoid(m)) for m in margins]).mean()
                accuracy = torch.stack([m > 0 for m in margins]).double().mean()
            losses.append(config.preference_weight * preference + anchored)
            note(
                longpo__preference_loss=preference,
                rewards__chosen=sum(reward_chosen),
                rewards__rejected=sum(reward_rejected),
                rewards__margins=sum(reward_chosen) - sum(reward_rejected),
                rewards__accuracies=accuracy,
                logps__chosen=sum(chosen),
                logps__rejected=sum(rejected),
            )
        elif config.objective == "sft-chosen-constraint":
            ratios = [torch.exp(reference[k] - logps[k]) for t in document.turns for k in t.chosen]
            kl = torch.stack([r - 1 - torch.log(r) for r in ratios]).sum()
            losses.append(anchored + config.beta * kl)
            note(longpo__kl=kl, logps__chosen=sum(chosen))
        elif config.objective == "sft-chosen":
            losses.append(nll)
            note(logps__chosen=sum(chosen))
        else:
            losses.append(nll)
            note(logps__rejected=sum(rejected))
        if config.has_nll:
            note(longpo__nll_loss=nll)
    return torch.stack(losses), {name: torch.stack(values) for name, values in metrics.items()}
