"""Context-parallel attention on real gloo ranks equals the dense twin of the whole row, gradients included."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType

from megatron_longpo.attention.context_parallel import context_parallel_attention
from megatron_longpo.attention.core_attention import SharedPrefixAttention
from megatron_longpo.attention.dense import dense_attention
from megatron_longpo.attention.row_order import to_rank_order, to_row_order
from megatron_longpo.data.layout import DocumentLayout, RowLayout
from tests.distributed.harness import run_ranks

HEADS, GROUPS, HEAD_DIM = 8, 4, 8
SCALE = 1 / math.sqrt(HEAD_DIM)
ROWS = (
    ((DocumentLayout(61, (9, 14)),), 1),
    ((DocumentLayout(1, (1, 2)),), 1),  # most ranks hold padding only
    ((DocumentLayout(33, (5, 3, 8)), DocumentLayout(17, (4,)), DocumentLayout(6, ())), 16),
)


def layouts(cp_size: int) -> list[RowLayout]:
    return [RowLayout(documents, cp_size, row_multiple) for documents, row_multiple in ROWS]


def random_row(layout: RowLayout, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """q, k, v and a gradient of the output for the whole row, equal on every rank."""
    generator = torch.Generator().manual_seed(7)
    shapes = [(layout.padded_tokens, heads, HEAD_DIM) for heads in (HEADS, GROUPS, GROUPS, HEADS)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def errors_of_rank(rank: int, cp_size: int, comm_type: str) -> list[float]:
    """Largest errors of the output and every gradient of this rank's tokens, over all rows."""
    errors = []
    for layout in layouts(cp_size):
        mine = layout.local_index(rank)
        *row, row_grad = random_row(layout)
        local = [x[mine].clone().requires_grad_() for x in row]
        out = context_parallel_attention(*local, layout, dist.group.WORLD, comm_type, SCALE)
        actual = [out, *torch.autograd.grad(out, local, row_grad[mine])]
        leaves = [x.requires_grad_() for x in row]
        dense = dense_attention(*leaves, layout, SCALE)
        expected = [dense, *torch.autograd.grad(dense, leaves, row_grad)]
        assert [x.shape for x in actual] == [x[mine].shape for x in expected]
        assert all(x.is_contiguous() for x in actual)
        errors += [(a - b[mine]).abs().max().item() for a, b in zip(actual, expected, strict=True)]
    return errors


@pytest.mark.parametrize("cp_size", [2, 4])
@pytest.mark.parametrize("comm_type", ["all_gather", "a2a"])
def test_equals_dense_twin(comm_type: str, cp_size: int) -> None:
    for rank, errors in enumerate(run_ranks(errors_of_rank, cp_size, cp_size, comm_type)):
        assert max(errors) < 1e-12, f"rank {rank}: {errors}"


def module_results(rank: int, comm_type: str) -> tuple[torch.Tensor, ...]:
    """bf16 output and gradients of one rank through the Megatron module, whose views are cut from one projection."""
    layout = layouts(2)[0]
    *row, row_grad = random_row(layout, torch.bfloat16)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        attention_dropout=0.0,
        context_parallel_size=2,
        cp_comm_type=comm_type,
    )
    groups = SimpleNamespace(cp=dist.group.WORLD)
    module = SharedPrefixAttention(config, 1, AttnMaskType.causal, "self", pg_collection=groups)
    mine = layout.local_index(rank)
    fused = torch.cat([x[mine] for x in row], 1).unsqueeze(1).requires_grad_()
    query, key, value = fused.split((HEADS, GROUPS, GROUPS), 2)
    out = module(query, key, value, layout.to_tensor())
    (grad,) = torch.autograd.grad(out, fused, row_grad[mine].flatten(1).unsqueeze(1))
    return out.detach().unflatten(2, (HEADS, -1)), *grad.split((HEADS, GROUPS, GROUPS), 2)


@pytest.mark.parametrize("comm_type", ["all_gather", "a2a"])
def test_module_in_bf16(comm_type: str) -> None:
    layout = layouts(2)[0]
    *leaves, row_grad = (x.double() for x in random_row(layout, torch.bfloat16))
    leaves = [x.requires_grad_() for x in leaves]
    dense = dense_attention(*leaves, layout, SCALE)
    expected = [dense.detach(), *torch.autograd.grad(dense, leaves, row_grad)]
    results = run_ranks(module_results, 2, comm_type)
    for name, parts, whole in zip(("out", "dq", "dk", "dv"), zip(*results, strict=True), expected, strict=True):
        assert all(part.dtype == torch.bfloat16 for part in parts)
        actual = torch.cat(parts).squeeze(1)[layout.gathered_index()].double()
        error = ((actual - whole).norm() / whole.norm()).item()
        assert error < 1e-2, f"{name} is off by {error:.1e}"


def messages(rank: int) -> list[str]:
    """What the errors of a group of 2 say."""
    layout = layouts(2)[0]
    q, k, v, _ = (x[layout.local_index(rank)] for x in random_row(layout))
    said = []
    for arguments in (
        (q, k[:, :3], v[:, :3], layout, dist.group.WORLD, "a2a", SCALE),
        (q, k, v, layout, dist.group.WORLD, "p2p", SCALE),
        (q, k, v, RowLayout(layout.documents, 4), dist.group.WORLD, "a2a", SCALE),
        (q[1:], k, v, layout, dist.group.WORLD, "all_gather", SCALE),
    ):
        try:
            context_parallel_attention(*arguments)
        except ValueError as error:
            said.append(str(error))
    return said


def test_errors_name_the_flag() -> None:
    for heads, comm_type, cp_size, tokens in run_ranks(messages, 2):
        assert "--cp-comm-type a2a" in heads and "3 key/value heads" in heads and "all_gather" in heads
        assert comm_type == "--cp-comm-type 'p2p' is not one of all_gather, a2a"
        assert "laid out for 4 context-parallel ranks in a group of 2" in cp_size
        assert "for a layout of" in tokens


@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_orders_are_each_others_inverse(cp_size: int) -> None:
    cpu = torch.device("cpu")
    for layout in layouts(cp_size):
        row = torch.arange(layout.padded_tokens)
        by_rank = row[to_rank_order(layout, cpu)]
        assert torch.equal(by_rank, torch.cat([layout.local_index(rank) for rank in range(cp_size)]))
        assert torch.equal(by_rank[to_row_order(layout, cpu)], row)
