"""The losses against the paper's equations written out by hand, and their numerical corners."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_longpo.config import ObjectiveConfig
from megatron_longpo.objective.losses import kl_estimate, objective_loss
from megatron_longpo.training.step import metric_names
from tests.objective.conversations import Case, by_hand, make_case, take

CONFIGS = [
    ObjectiveConfig(objective=objective, turns=turns, turn_reduction=reduction, beta=0.3, preference_weight=0.7)
    for objective in ("longpo", "dpo")
    for turns in ("joint", "independent")
    for reduction in ("sum", "mean")
]
CONFIGS += [ObjectiveConfig(beta=0.5, preference_weight=1.0, nll_weight=0.0), ObjectiveConfig()]
CONFIGS += [
    ObjectiveConfig(objective=objective, turns=turns, beta=0.3)
    for objective in ("sft-chosen", "sft-rejected", "sft-chosen-constraint")
    for turns in ("joint", "independent")
]
CONFIGS += [ObjectiveConfig(objective="sft-chosen-constraint", nll_weight=weight) for weight in (0.0, 0.4)]


def name_of(config: ObjectiveConfig) -> str:
    return f"{config.objective}-{config.turns}-{config.turn_reduction}-{config.preference_weight}-{config.nll_weight}"


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_equals_the_equations(config: ObjectiveConfig) -> None:
    """Losses, metrics and gradients of documents of 1 to 4 turns in one micro-batch, and of each alone."""
    for num_turns in [(1, 2, 3, 4), (4, 1), (1,), (2,), (3,), (4,)]:
        case = make_case(config, num_turns)
        ours, expected = case.logps.clone().requires_grad_(), case.logps.clone().requires_grad_()
        losses, metrics = objective_loss(config, ours, case.predictions)
        expected_losses, expected_metrics = by_hand(config, case, expected)
        torch.testing.assert_close(losses, expected_losses, rtol=1e-12, atol=1e-13)
        assert metrics.keys() == expected_metrics.keys() == set(metric_names(config)) - {"loss"}
        for name, values in metrics.items():
            assert not values.requires_grad
            torch.testing.assert_close(values, expected_metrics[name], rtol=1e-12, atol=1e-12, msg=name)
        # Unequal weights, so that a document's gradient cannot hide in another's.
        weights = torch.arange(1.0, len(losses) + 1, dtype=torch.float64)
        (losses * weights).sum().backward()
        (expected_losses * weights).sum().backward()
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-12, atol=1e-13)


def test_the_default_is_the_papers() -> None:
    """λ 0.01, β 0.1, one sigmoid over the rewards summed over turns."""
    case = make_case(ObjectiveConfig(), (2,))
    (document,) = case.documents
    p, q = case.logps, case.predictions.reference_logps
    chosen = [k for turn in document.turns for k in turn.chosen]
    rejected = [k for turn in document.turns for k in turn.rejected]
    margin = 0.1 * ((p[chosen] - q[chosen]).sum() - (p[rejected] - q[rejected]).sum())
    nll = -p[document.prefix + document.between[0] + document.between[1] + chosen].mean()
    losses, _ = objective_loss(ObjectiveConfig(), p, case.predictions)
    torch.testing.assert_close(losses[0], 0.01 * -torch.log(torch.sigmoid(margin)) + nll, rtol=1e-12, atol=0)


def shifted(case: Case, role: int, by: float) -> torch.Tensor:
    """The case's log-probs with ``by`` added to every response token of one role."""
    slot = case.predictions.response_slot
    return torch.where((slot >= 0) & (slot % 2 == role), case.logps + by, case.logps)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lost_and_won_comparisons_stay_finite(dtype: torch.dtype, reduction: str) -> None:
    """At margins of thousands the loss is linear on the lost side and 0 on the won side, with gradients to match."""
    config = ObjectiveConfig(beta=1.0, preference_weight=1.0, nll_weight=0.0, turn_reduction=reduction)
    case = make_case(config, (1,), dtype)
    for role, accuracy in ((0, 0.0), (1, 1.0)):
        logps = shifted(case, role, -5000.0).requires_grad_()
        losses, metrics = objective_loss(config, logps, case.predictions)
        losses.sum().backward()
        assert logps.grad is not None and torch.isfinite(logps.grad).all()
        assert metrics["rewards/accuracies"].item() == accuracy
        expected = -metrics["rewards/margins"] if role == 0 else torch.zeros(1, dtype=dtype)
        torch.testing.assert_close(losses.detach(), expected)
        assert logps.grad.abs().max().item() == (1.0 if role == 0 else 0.0)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_tie_is_not_won(reduction: str) -> None:
    """Under the weights of its reference a policy prefers nothing yet."""
    config = ObjectiveConfig(turn_reduction=reduction)
    case = make_case(config, (1, 3))
    equal = replace(case.predictions, reference_logps=case.logps)
    assert objective_loss(config, case.logps, equal)[1]["rewards/accuracies"].tolist() == [0.0, 0.0]


def test_the_kl_estimate_is_not_negative_and_keeps_its_digits() -> None:
    difference = torch.tensor([0.0, 1e-3, -1e-3, 1e-6, 2.0, -30.0], dtype=torch.float64)
    estimate = kl_estimate(-5 - difference, torch.full_like(difference, -5.0))
    assert (estimate >= 0).all() and estimate[0] == 0
    series = difference**2 / 2 + difference**3 / 6 + difference**4 / 24
    torch.testing.assert_close(estimate[:4], series[:4], rtol=1e-9, atol=1e-18)
    logps = (-5 - difference).requires_grad_()
    kl_estimate(logps, torch.full_like(difference, -5.0)).sum().backward()
    assert logps.grad is not None and logps.grad[0] == 0, "equal models are where the constraint rests"


def test_an_impossible_document_token_poisons_no_other_loss() -> None:
    """The document's tokens have no reference: a KL estimate on them would overflow, and its gradient with it."""
    for objective in ("longpo", "sft-chosen", "sft-chosen-constraint"):
        config = ObjectiveConfig(objective=objective)
        case = make_case(config, (2, 1))
        logps = case.logps.clone()
        logps[case.documents[0].prefix] = -1e4
        logps.requires_grad_()
        losses, _ = objective_loss(config, logps, case.predictions)
        losses.sum().backward()
        assert torch.isfinite(losses).all() and logps.grad is not None and torch.isfinite(logps.grad).all()


def test_fp32_results_do_not_depend_on_the_order_of_predictions() -> None:
    config = ObjectiveConfig()
    case = make_case(config, (4, 4, 4), torch.float32)
    losses, metrics = objective_loss(config, case.logps, case.predictions)
    assert losses.dtype == torch.float32 and {m.dtype for m in metrics.values()} == {torch.float32}
    for seed in range(10):
        order = torch.randperm(len(case.logps), generator=torch.Generator().manual_seed(seed))
        again, metrics_again = objective_loss(config, case.logps[order], take(case.predictions, order))
        assert torch.equal(again, losses)
        assert all(torch.equal(metrics_again[name], value) for name, value in metrics.items())


def test_a_long_document_keeps_its_digits_in_fp32() -> None:
    """400K predictions of one document: a naive fp32 sum is wrong in the fourth digit."""
    config = ObjectiveConfig(objective="sft-chosen")
    num_tokens = 400_000
    case = make_case(config, (1,), torch.float32)
    predictions = replace(
        case.predictions,
        nll_weight=torch.full((num_tokens,), 1 / num_tokens),
        document_index=torch.zeros(num_tokens, dtype=torch.int64),
        response_slot=torch.full((num_tokens,), -1),
        reference_logps=torch.zeros(num_tokens),
    )
    logps = -5 * torch.rand(num_tokens, generator=torch.Generator().manual_seed(0))
    losses, _ = objective_loss(config, logps, predictions)
    assert losses.item() == pytest.approx(-logps.double().mean().item(), rel=2e-7)


@pytest.mark.parametrize("objective", ["longpo", "sft-chosen-constraint", "sft-rejected"])
def test_a_rank_without_predictions_still_has_a_graph(objective: str) -> None:
    """Megatron calls backward on every rank."""
    config = ObjectiveConfig(objective=objective)
    case = make_case(config, (2, 1))
    logps = torch.zeros(0, requires_grad=True)
    losses, _ = objective_loss(config, logps, take(case.predictions, torch.zeros(0, dtype=torch.int64)))
    losses.sum().backward()
    assert losses.shape == (2,) and logps.grad is not None


def test_an_unknown_objective_is_an_error() -> None:
    case = make_case(ObjectiveConfig())
    with pytest.raises(ValueError, match="--objective orpo is unknown; choose longpo"):
        objective_loss(ObjectiveConfig(objective="orpo"), case.logps, case.predictions)
