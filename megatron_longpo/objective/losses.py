"""From token log-probs to the loss of each document: LongPO's Eq. 11-14 and the baselines of its Figure 4.

Everything that is a number of a document or a turn is computed in fp64: it costs nothing, the margin of two sums of
log-probs keeps its digits, and the order in which ranks add their shares does not show in the fp32 result.
"""

# K=predictions of this context-parallel rank D=documents M=max_turns

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import logsigmoid

from megatron_longpo.config import ObjectiveConfig
from megatron_longpo.data.predictions import Predictions

Metrics = dict[str, torch.Tensor]
"""By metric name, ``[D]``, detached, of the loss's dtype."""


def objective_loss(
    config: ObjectiveConfig,
    logps: torch.Tensor,
    predictions: Predictions,
    cp_group: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, Metrics]:
    """The loss of every document of a micro-batch, and what else is worth logging about it.

    Collectives: 1 CP all-reduce of ``[(2 + 4 M) D]`` forward, 0 backward: a rank back-propagates through its own
    predictions only, and the data- and context-parallel sum of the weights' gradients adds the ranks up.

    Args:
        config: Which objective, and its weights.
        logps: ``[K]``, log π_θ of every prediction, fp32 or fp64.
        predictions: What was predicted.
        cp_group: The ranks that share the documents; None or one rank: this rank has every prediction.

    Returns:
        The losses ``[D]`` of the dtype of ``logps``, and the metrics; the same on every rank of ``cp_group``.
    """
    kind = config.objective
    sums = _document_sums(logps.double(), predictions, cp_group, with_kl=kind == "sft-chosen-constraint")
    # Of what was not predicted nothing is said: a mean over no predictions would read 0.
    nll = {"longpo/nll_loss": sums.nll} if config.has_nll else {}
    if kind in ("longpo", "dpo"):
        preference, metrics = preference_loss(config, sums, predictions.turn_mask)
        losses = config.preference_weight * preference + config.nll_weight * sums.nll
        metrics = {"longpo/preference_loss": preference, **nll, **metrics}
    elif kind == "sft-chosen-constraint":
        losses = config.nll_weight * sums.nll + config.beta * sums.kl
        metrics = {**nll, "longpo/kl": sums.kl, "logps/chosen": sums.chosen.sum(dim=1)}
    elif kind == "sft-chosen":
        losses, metrics = sums.nll, {**nll, "logps/chosen": sums.chosen.sum(dim=1)}
    elif kind == "sft-rejected":
        losses, metrics = sums.nll, {**nll, "logps/rejected": sums.rejected.sum(dim=1)}
    else:
        raise ValueError(
            f"--objective {kind} is unknown; choose longpo, dpo, sft-chosen, sft-rejected or sft-chosen-constraint"
        )
    return losses.to(logps.dtype), {name: value.detach().to(logps.dtype) for name, value in metrics.items()}


@dataclass(frozen=True)
class DocumentSums:
    """What the losses need of the predictions, summed over tokens and ranks, fp64.

    Args:
        nll: ``[D]``, minus the mean log-prob of the NLL sequence, over all its predictions (Eq. 14).
        chosen: ``[D, M]``, Σ log π_θ over the tokens of each chosen response; 0 where there is no such turn.
        rejected: ``[D, M]``, the same of the rejected responses.
        reference_chosen: ``[D, M]``, Σ log π_S of the chosen responses.
        reference_rejected: ``[D, M]``, Σ log π_S of the rejected responses.
        kl: ``[D]``, estimate of KL(π_θ ‖ π_S), summed over the tokens of the chosen responses; 0 if not asked for.
    """

    nll: torch.Tensor
    chosen: torch.Tensor
    rejected: torch.Tensor
    reference_chosen: torch.Tensor
    reference_rejected: torch.Tensor
    kl: torch.Tensor


def preference_loss(
    config: ObjectiveConfig, sums: DocumentSums, turn_mask: torch.Tensor
) -> tuple[torch.Tensor, Metrics]:
    """``−log σ(reward(chosen) − reward(rejected))`` with ``reward = β (log π_θ − log π_S)`` (Eq. 11-13).

    One comparison per document, of the rewards summed over its turns; with ``turn_reduction`` ``mean`` one per turn,
    averaged, and then the accuracy is the share of turns that are right.

    Args:
        config: ``beta`` and ``turn_reduction``.
        sums: The log-probs.
        turn_mask: bool ``[D, M]``, which turns exist.

    Returns:
        The losses ``[D]`` and the metrics under TRL's names; rewards and log-probs are sums over turns.
    """
    chosen = config.beta * (sums.chosen - sums.reference_chosen)
    rejected = config.beta * (sums.rejected - sums.reference_rejected)
    turn_margins = chosen - rejected
    margins = turn_margins.sum(dim=1)
    if config.turn_reduction == "mean":
        share = turn_mask.to(margins.dtype) / turn_mask.sum(dim=1, keepdim=True)
        losses = -(share * logsigmoid(turn_margins)).sum(dim=1)
        accuracies = (share * (turn_margins > 0)).sum(dim=1)
    else:
        losses = -logsigmoid(margins)
        accuracies = (margins > 0).to(margins.dtype)
    return losses, {
        "rewards/chosen": chosen.sum(dim=1),
        "rewards/rejected": rejected.sum(dim=1),
        "rewards/accuracies": accuracies,
        "rewards/margins": margins,
        "logps/chosen": sums.chosen.sum(dim=1),
        "logps/rejected": sums.rejected.sum(dim=1),
    }


def kl_estimate(logps: torch.Tensor, reference_logps: torch.Tensor) -> torch.Tensor:
    """Per token, ``r − 1 − log r`` with ``r = π_S / π_θ``: the k3 estimator of KL(π_θ ‖ π_S), never negative.

    Source: J. Schulman, "Approximating KL divergence" (2020).
    """
    log_ratio = reference_logps - logps
    return torch.expm1(log_ratio) - log_ratio


def _document_sums(
    logps: torch.Tensor, predictions: Predictions, cp_group: dist.ProcessGroup | None, with_kl: bool
) -> DocumentSums:
    """Add up the predictions of a rank, then of all ranks."""
    documents, turns = predictions.num_documents, predictions.max_turns
    reference = predictions.reference_logps.to(logps)
    slot = predictions.response_slot
    # The tokens outside of responses are added to one slot more, which is then cut off.
    num_slots = documents * turns * 2
    bins = torch.where(slot >= 0, slot, num_slots)
    if with_kl:
        # Masked before the exponential: tokens that are no response have no reference, and 0 · inf is not a number.
        unused = (slot < 0) | (slot % 2 == 1)
        kl = kl_estimate(logps.masked_fill(unused, 0.0), reference.masked_fill(unused, 0.0))
    else:
        kl = torch.zeros_like(logps)
    per_rank = torch.cat(
        [
            _bin_sums(-predictions.nll_weight * logps, predictions.document_index, documents),
            _bin_sums(kl, predictions.document_index, documents),
            _bin_sums(logps, bins, num_slots + 1)[:-1],
            _bin_sums(reference, bins, num_slots + 1)[:-1],
        ]
    )
    nll, kl, policy, anchor = _sum_over_ranks(per_rank, cp_group).split([documents, documents, num_slots, num_slots])
    chosen, rejected = policy.view(documents, turns, 2).unbind(dim=2)
    reference_chosen, reference_rejected = anchor.view(documents, turns, 2).unbind(dim=2)
    return DocumentSums(nll, chosen, rejected, reference_chosen, reference_rejected, kl)


def _bin_sums(values: torch.Tensor, bins: torch.Tensor, num_bins: int) -> torch.Tensor:
    """``[num_bins]``, the sum of the values of each bin."""
    return values.new_zeros(num_bins).index_add(0, bins, values)


def _sum_over_ranks(values: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    return values if group is None or group.size() == 1 else _SumOverRanks.apply(values, group)


class _SumOverRanks(torch.autograd.Function):
    """All-reduce forward, identity backward."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        """The sum over ranks, of any shape: 1 all-reduce."""
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Every rank's own gradient: all ranks compute the same loss of the sum."""
        return grad, None
