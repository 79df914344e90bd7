"""The losses: pure functions from token log-probs to one loss per document (arXiv 2502.13922, Eq. 11-14, Fig. 4)."""

# K=predictions of this rank D=documents of the micro-batch n=turns

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_longpo.config import ObjectiveConfig
from megatron_longpo.data.predictions import Predictions

CHOSEN, REJECTED = 0, 1


def objective_loss(
    config: ObjectiveConfig,
    logps: torch.Tensor,
    predictions: Predictions,
    cp_group: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and metrics of every document of a micro-batch.

    Collectives: 1 context-parallel all-reduce forward, 0 backward: every rank back-propagates from the same loss into
    its own tokens, and the sum over ranks is the gradient.

    Args:
        config: Objective and weights.
        logps: ``[K]``, log-probs of this rank's predictions.
        predictions: What they predict.
        cp_group: Ranks that share the row's tokens; None for one rank.

    Returns:
        Loss ``[D]``, and metrics ``[D]`` by name, detached; the same on every context-parallel rank.
    """
    sums = _document_sums(config, logps, predictions, cp_group)
    nll, responses, reference = -sums["nll"], sums["responses"], sums.get("reference")
    kind = config.objective
    metrics = {"longpo/nll_loss": nll}
    if kind in ("longpo", "dpo"):
        assert reference is not None
        losses, rewards = preference_loss(
            responses, reference, predictions.turn_mask, config.beta, config.turn_reduction
        )
        chosen, rejected = rewards.sum(dim=1).unbind(-1)
        metrics |= {
            "longpo/preference_loss": losses,
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
            "rewards/margins": chosen - rejected,
            "logps/chosen": responses[:, :, CHOSEN].sum(dim=1),
            "logps/rejected": responses[:, :, REJECTED].sum(dim=1),
        }
        total = config.preference_weight * losses + config.nll_weight * nll
    elif kind == "sft-rejected":
        metrics["logps/rejected"] = responses[:, :, REJECTED].sum(dim=1)
        total = nll
    else:
        metrics["logps/chosen"] = responses[:, :, CHOSEN].sum(dim=1)
        total = nll
        if kind == "sft-chosen-constraint":
            metrics["longpo/kl"] = sums["kl"]
            total = config.nll_weight * nll + config.beta * sums["kl"]
    return total, {name: value.detach() for name, value in metrics.items()}


def preference_loss(
    responses: torch.Tensor,
    reference: torch.Tensor,
    turn_mask: torch.Tensor,
    beta: float,
    turn_reduction: str = "sum",
) -> tuple[torch.Tensor, torch.Tensor]:
    """−log σ of the reward margin (Eq. 11-13).

    Args:
        responses: ``[D, n, 2]``, log π_θ of each turn's chosen and rejected response, summed over its tokens.
        reference: ``[D, n, 2]``, the same under π_S.
        turn_mask: bool ``[D, n]``, which turns exist.
        beta: Scale of the rewards.
        turn_reduction: ``sum``: one sigmoid of the rewards summed over turns (Eq. 13); ``mean``: the mean over turns
            of one loss each.

    Returns:
        Loss ``[D]``, and rewards β (log π_θ − log π_S) ``[D, n, 2]``, 0 where a turn does not exist.
    """
    rewards = beta * (responses - reference) * turn_mask[:, :, None]
    margins = rewards[:, :, CHOSEN] - rewards[:, :, REJECTED]
    if turn_reduction == "sum":
        return F.softplus(-margins.sum(dim=1)), rewards
    return (F.softplus(-margins) * turn_mask).sum(dim=1) / turn_mask.sum(dim=1), rewards


def kl_estimate(logps: torch.Tensor, reference_logps: torch.Tensor) -> torch.Tensor:
    """KL(π_θ ‖ π_S) per token from one sample of π_θ: exp(r) − r − 1 with r = log π_S − log π_θ (k3: Schulman 2020).

    Args:
        logps: log π_θ ``[...]``.
        reference_logps: log π_S ``[...]``.

    Returns:
        ``[...]``, never negative.
    """
    ratio = reference_logps - logps
    return torch.expm1(ratio) - ratio


def _document_sums(
    config: ObjectiveConfig, logps: torch.Tensor, predictions: Predictions, cp_group: dist.ProcessGroup | None
) -> dict[str, torch.Tensor]:
    """Everything a loss needs that is a sum over tokens, over all context-parallel ranks, in one all-reduce.

    Returns:
        ``nll`` ``[D]`` Σ weight·logp; ``responses`` ``[D, n, 2]`` log-probs per turn and role; with a reference its
        ``reference`` ``[D, n, 2]``; for the constraint ``kl`` ``[D]``, the mean over the chosen response tokens.
    """
    num_documents, num_turns = predictions.num_documents, predictions.max_turns
    is_response = predictions.response_slot >= 0
    slots = predictions.response_slot.clamp_min(0)
    own = is_response.to(logps.dtype)

    def by_document(values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(num_documents).index_add(0, predictions.document_index, values)

    def by_response(values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(num_documents * num_turns * 2).index_add(0, slots, values * own)

    parts = {"nll": by_document(predictions.nll_weight.to(logps.dtype) * logps), "responses": by_response(logps)}
    reference_logps = predictions.reference_logps.to(logps.dtype)
    if config.needs_reference:
        parts["reference"] = by_response(reference_logps)
    if config.objective == "sft-chosen-constraint":
        parts["kl"] = by_document(kl_estimate(logps, reference_logps) * own)
        parts["tokens"] = by_document(own)
    flat = torch.cat(list(parts.values()))
    if cp_group is not None:
        flat = _SumOverRanks.apply(flat, cp_group)
    summed = dict(zip(parts, flat.split([len(part) for part in parts.values()]), strict=True))
    for name in ("responses", "reference"):
        if name in summed:
            summed[name] = summed[name].view(num_documents, num_turns, 2)
    if "kl" in summed:
        summed["kl"] = summed["kl"] / summed.pop("tokens")
    return summed


class _SumOverRanks(torch.autograd.Function):
    """All-reduce forward, identity backward: each rank's own summand gets the gradient of the shared sum."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        values = values.clone()
        dist.all_reduce(values, group=group)
        return values

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None
