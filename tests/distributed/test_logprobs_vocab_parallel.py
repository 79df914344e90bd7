"""The LM head with its vocabulary, and its row, split over 2 and 4 ranks equals the dense twin on one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_longpo.objective.dense import linear_logprobs_reference
from megatron_longpo.objective.logprobs import linear_logprobs
from tests.distributed.harness import run_ranks
from tests.distributed.late import late_transfers
from tests.objective.lm_head import HeadInputs, head_inputs

ROWS = 40
CASES = [
    # tensor-parallel size, true vocabulary (29: the last of 4 ranks holds only padding), chunk, dtype, row split too
    (2, 37, 16, torch.float64, False),
    (4, 37, 16, torch.float64, False),
    (4, 29, 1000, torch.float64, False),
    (4, 40, 7, torch.float32, False),
    (2, 37, 16, torch.float64, True),
    (4, 29, 1000, torch.float64, True),
    (4, 40, 7, torch.float32, True),
]


def _inputs(vocab_size: int, dtype: torch.dtype) -> HeadInputs:
    return head_inputs(row_tokens=48, vocab_rows=ROWS, vocab_size=vocab_size, dtype=dtype).leaves()


def _every_case(rank: int) -> list[dict[str, Any]]:
    with late_transfers():
        return _late_cases(rank)


def _late_cases(rank: int) -> list[dict[str, Any]]:
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
    for size, vocab_size, chunk_tokens, dtype, sequence_parallel in CASES:
        inputs = _inputs(vocab_size, dtype)
        group = groups[size]
        hidden = inputs.hidden.detach().chunk(size if sequence_parallel else 1)[group.rank() * sequence_parallel]
        hidden = hidden.clone().requires_grad_()
        shard = inputs.weight.detach().chunk(size)[group.rank()].clone().requires_grad_()
        calls.clear()
        logps = linear_logprobs(
            hidden,
            shard,
            inputs.source_index,
            inputs.targets,
            vocab_size=vocab_size,
            chunk_tokens=chunk_tokens,
            tp_group=group,
            sequence_parallel=sequence_parallel,
        )
        forward = list(calls)
        logps.backward(inputs.grad_logps)
        results.append(
            {
                "logps": logps.detach(),
                "grad_hidden": hidden.grad,
                "grad_weight": shard.grad,
                "collectives": (forward, calls[len(forward) :]),
            }
        )
    empty = head_inputs(0, vocab_rows=ROWS).leaves()
    shard = empty.weight.detach().chunk(4)[rank].clone().requires_grad_()
    for split in (False, True):
        logps = linear_logprobs(
            empty.hidden, shard, *empty.arguments()[2:], vocab_size=37, tp_group=groups[4], sequence_parallel=split
        )
        logps.sum().backward()
    return results


@pytest.fixture(scope="module")
def results() -> list[list[dict[str, Any]]]:
    return run_ranks(_every_case, 4)


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda n: "tp{}-vocab{}-chunk{}-{}-sp{}".format(*CASES[n]))
def test_equals_the_dense_twin(results: list[list[dict[str, Any]]], case: int) -> None:
    size, vocab_size, _, dtype, sequence_parallel = CASES[case]
    inputs = _inputs(vocab_size, dtype)
    dense = linear_logprobs_reference(*inputs.arguments(), vocab_size=vocab_size)
    dense.backward(inputs.grad_logps)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for first in range(0, 4, size):
        ranks = [results[rank][case] for rank in range(first, first + size)]
        for result in ranks:
            torch.testing.assert_close(result["logps"], dense.detach(), rtol=tolerance, atol=tolerance)
            assert torch.equal(result["logps"], ranks[0]["logps"]), "ranks disagree"
        # Every rank has the gradient of its tokens, or of all a part that the caller's region adds to the others.
        parts = [result["grad_hidden"] for result in ranks]
        grad_hidden = torch.cat(parts) if sequence_parallel else sum(parts)
        torch.testing.assert_close(grad_hidden, inputs.hidden.grad, rtol=tolerance, atol=tolerance)
        grad_weight = torch.cat([result["grad_weight"] for result in ranks])
        torch.testing.assert_close(grad_weight, inputs.weight.grad, rtol=tolerance, atol=tolerance)


def test_collectives_are_the_documented_ones(results: list[list[dict[str, Any]]]) -> None:
    inputs = head_inputs()
    total, hidden_size = len(inputs.targets), inputs.hidden.shape[1]
    for rank in results:
        for (_, _, chunk_tokens, _, sequence_parallel), result in zip(CASES, rank, strict=True):
            chunks = [min(chunk_tokens, total - start) * hidden_size for start in range(0, total, chunk_tokens)]
            forward, backward = result["collectives"]
            if not sequence_parallel:
                chunks = []
            assert forward == [*chunks, total, 2 * total]
            assert sorted(backward) == sorted([*chunks, *chunks])
