"""Losses of documents whose predictions are spread over context-parallel ranks equal those on one rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_longpo.config import ObjectiveConfig
from megatron_longpo.objective.losses import objective_loss
from tests.distributed.harness import run_ranks
from tests.objective.conversations import Case, make_case, take

CONFIGS = [
    ObjectiveConfig(preference_weight=1.0),
    ObjectiveConfig(turns="independent", turn_reduction="mean", preference_weight=1.0),
    ObjectiveConfig(objective="sft-chosen-constraint"),
    ObjectiveConfig(objective="sft-rejected"),
]
CASES = [(config, num_turns) for config in CONFIGS for num_turns in ((1, 2, 3, 4), (2,))]


def _share(case: Case, rank: int) -> torch.Tensor:
    """Which predictions a rank has: every other one, or, of a lone document, all of them on the first rank."""
    if len(case.documents) == 1:
        return torch.arange(len(case.logps) if rank == 0 else 0)
    return torch.arange(rank, len(case.logps), 2)


def _every_objective(rank: int) -> list[dict[str, Any]]:
    results = []
    for config, num_turns in CASES:
        case = make_case(config, num_turns)
        share = _share(case, rank)
        logps = case.logps[share].requires_grad_()
        losses, metrics = objective_loss(config, logps, take(case.predictions, share), cp_group=dist.group.WORLD)
        losses.sum().backward()
        results.append({"losses": losses.detach(), "metrics": metrics, "grad": logps.grad})
    return results


def test_losses_are_replicated_and_gradients_are_each_ranks_own() -> None:
    results = run_ranks(_every_objective, 2)
    for number, (config, num_turns) in enumerate(CASES):
        case = make_case(config, num_turns)
        logps = case.logps.clone().requires_grad_()
        losses, metrics = objective_loss(config, logps, case.predictions)
        losses.sum().backward()
        assert logps.grad is not None
        for rank in range(2):
            result = results[rank][number]
            torch.testing.assert_close(result["losses"], losses.detach(), rtol=1e-12, atol=1e-13)
            for name, value in metrics.items():
                torch.testing.assert_close(result["metrics"][name], value, rtol=1e-12, atol=1e-12, msg=name)
            torch.testing.assert_close(result["grad"], logps.grad[_share(case, rank)], rtol=1e-12, atol=1e-13)
