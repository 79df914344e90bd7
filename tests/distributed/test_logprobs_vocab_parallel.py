"""The LM head with its vocabulary split over 2 and 4 ranks equals the dense twin on one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_longpo.objective.dense import linear_logprobs_reference
from megatron_longpo.objective.logprobs import linear_logprobs
from tests.distributed.harness import run_ranks
from tests.objective.lm_head import head_inputs

ROWS = 40
CASES = [
    # tensor-parallel size, true vocabulary (29: the last of 4 ranks holds only padding), chunk, dtype
    (2, 37, 16, torch.float64),
    (4, 37, 16, torch.float64),
    (4, 29, 1000, torch.float64),
    (4, 40, 7, torch.float32),
]


def _every_case(rank: int) -> list[dict[str, Any]]:
    groups = {4: dist.group.WORLD}
    for ranks in ([0, 1], [2, 3]):
        group = dist.new_group(ranks)
        if rank in ranks:
            groups[2] = group
    calls: list[int] = []
    all_reduce = dist.all_reduce

    def counted(tensor: torch.Tensor, **options: Any) -> Any:
        calls.append(tensor.numel())
        return all_reduce(tensor, **options)

    dist.all_reduce = counted
    results = []
    for size, vocab_size, chunk_tokens, dtype in CASES:
        inputs = head_inputs(vocab_rows=ROWS, vocab_size=vocab_size, dtype=dtype).leaves()
        group = groups[size]
        shard = inputs.weight.detach().chunk(size)[group.rank()].clone().requires_grad_()
        calls.clear()
        logps = linear_logprobs(
            inputs.hidden,
            shard,
            inputs.source_index,
            inputs.targets,
            vocab_size=vocab_size,
            chunk_tokens=chunk_tokens,
            tp_group=group,
        )
        forward = list(calls)
        logps.backward(inputs.grad_logps)
        results.append(
            {
                "logps": logps.detach(),
                "grad_hidden": inputs.hidden.grad,
                "grad_weight": shard.grad,
                "collectives": (forward, calls[len(forward) :]),
            }
        )
    empty = head_inputs(0, vocab_rows=ROWS).leaves()
    shard = empty.weight.detach().chunk(4)[rank].clone().requires_grad_()
    linear_logprobs(empty.hidden, shard, *empty.arguments()[2:], tp_group=groups[4]).sum().backward()
    return results


@pytest.fixture(scope="module")
def results() -> list[list[dict[str, Any]]]:
    return run_ranks(_every_case, 4)


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda n: "tp{}-vocab{}-chunk{}-{}".format(*CASES[n]))
def test_equals_the_dense_twin(results: list[list[dict[str, Any]]], case: int) -> None:
    size, vocab_size, _, dtype = CASES[case]
    inputs = head_inputs(vocab_rows=ROWS, vocab_size=vocab_size, dtype=dtype).leaves()
    dense = linear_logprobs_reference(*inputs.arguments(), vocab_size=vocab_size)
    dense.backward(inputs.grad_logps)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for first in range(0, 4, size):
        ranks = [results[rank][case] for rank in range(first, first + size)]
        for result in ranks:
            torch.testing.assert_close(result["logps"], dense.detach(), rtol=tolerance, atol=tolerance)
            assert torch.equal(result["logps"], ranks[0]["logps"]), "ranks disagree"
        # Every rank has its own part of the gradient; the caller's region adds them up.
        grad_hidden = sum(result["grad_hidden"] for result in ranks)
        torch.testing.assert_close(grad_hidden, inputs.hidden.grad, rtol=tolerance, atol=tolerance)
        grad_weight = torch.cat([result["grad_weight"] for result in ranks])
        torch.testing.assert_close(grad_weight, inputs.weight.grad, rtol=tolerance, atol=tolerance)


def test_two_collectives_forward_and_none_backward(results: list[list[dict[str, Any]]]) -> None:
    num_predictions = len(head_inputs().targets)
    for rank in results:
        for result in rank:
            assert result["collectives"] == ([num_predictions, 2 * num_predictions], [])
