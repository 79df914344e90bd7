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


def _share(case: Case, rank: int) -> torch.Tensor:
    """Which predictions a rank has; the last of three has none."""
    return torch.arange(rank, len(case.logps), 2) if rank < 2 else torch.zeros(0, dtype=torch.int64)


def _every_objective(rank: int) -> list[dict[str, Any]]:
    results = []
    for config in CONFIGS:
        case = make_case(config)
        share = _share(case, rank)
        logps = case.logps[share].requires_grad_()
        losses, metrics = objective_loss(config, logps, take(case.predictions, share), cp_group=dist.group.WORLD)
        losses.sum().backward()
        results.append({"losses": losses.detach(), "metrics": metrics, "grad": logps.grad})
    return results


def test_losses_are_replicated_and_gradients_are_each_ranks_own() -> None:
    results = run_ranks(_every_objective, 3)
    for number, config in enumerate(CONFIGS):
        case = make_case(config)
        logps = case.logps.clone().requires_grad_()
        losses, metrics = objective_loss(config, logps, case.predictions)
        losses.sum().backward()
        assert logps.grad is not None
        for rank in range(3):
            result = results[rank][number]
            torch.testing.assert_close(result["losses"], losses.detach(), rtol=1e-12, atol=1e-13)
            for name, value in metrics.items():
                torch.testing.assert_close(result["metrics"][name], value, rtol=1e-12, atol=1e-12, msg=name)
            torch.testing.assert_close(result["grad"], logps.grad[_share(case, rank)], rtol=1e-12, atol=1e-13)
