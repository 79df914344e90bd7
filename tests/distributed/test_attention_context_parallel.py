"""Context-parallel attention on real gloo ranks equals the dense twin of the whole row, gradients included."""

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_longpo.attention import all_gather
from megatron_longpo.attention.context_parallel import context_parallel_attention
from megatron_longpo.attention.dense import dense_attention
from megatron_longpo.attention.row_order import to_rank_order, to_row_order
from megatron_longpo.config.parallel import CP_COMM_TYPES, HIERARCHICAL
from megatron_longpo.data.layout import DocumentLayout, RowLayout
from tests.distributed.harness import run_ranks
from tests.distributed.late import late_transfers

HEADS, GROUPS, HEAD_DIM = 8, 4, 8
SCALE = 1 / math.sqrt(HEAD_DIM)
FOUR_TURNS = {"joint": (23, 28), "independent": (3, 5, 4, 9, 6, 2, 7, 3)}
"""Branches of a document with four turns in either mode; with one turn both modes have two."""
ROWS = (
    ((DocumentLayout(61, (9, 14)),), 1, None),
    ((DocumentLayout(1, (1, 2)),), 1, None),  # most ranks hold padding only
    ((DocumentLayout(33, (5, 3, 8)), DocumentLayout(17, (4,)), DocumentLayout(6, ())), 16, None),
    ((DocumentLayout(61, (9, 14)), DocumentLayout(6, (5,))), 1, 12),  # a window over several chunks, or one document
    ((DocumentLayout(61, (9, 14)),), 16, 3),  # a window inside a chunk
    ((DocumentLayout(61, (9, 14)),), 1, 16),  # as long as a chunk on 2 ranks
    ((DocumentLayout(61, (9, 14)),), 1, 65),  # longer than the prefix
    *(((DocumentLayout(45, FOUR_TURNS[turns]),), 1, window) for turns in FOUR_TURNS for window in (4, 11, 50)),
)
FLAT = tuple(name for name in CP_COMM_TYPES if name != HIERARCHICAL)
MODULE_CASES = tuple(itertools.product(FLAT, range(5)))


def layouts(cp_size: int) -> list[RowLayout]:
    return [RowLayout(documents, cp_size, row_multiple, window) for documents, row_multiple, window in ROWS]


def random_row(layout: RowLayout, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """q, k, v and a gradient of the output for the whole row, equal on every rank."""
    generator = torch.Generator().manual_seed(7)
    shapes = [(layout.padded_tokens, heads, HEAD_DIM) for heads in (HEADS, GROUPS, GROUPS, HEADS)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def errors_of_rank(rank: int, cp_size: int) -> dict[str, float]:
    """The largest error of any output or gradient of this rank's tokens, for every way of communicating and row.

    Transfers are late, so that none of it hangs on how fast they were; the tests of layouts have them as they come.
    """
    errors = {}
    comm_types, hierarchy = FLAT, None
    if cp_size == 4:
        groups = [[dist.new_group(ranks) for ranks in level] for level in ([[0, 1], [2, 3]], [[0, 2], [1, 3]])]
        comm_types, hierarchy = CP_COMM_TYPES, (groups[0][rank // 2], groups[1][rank % 2])
    cases = [*((name, 2**60) for name in comm_types), ("all_gather", 0)]  # the last one in chunks of heads
    for number, layout in enumerate(layouts(cp_size)):
        mine = layout.local_index(rank)
        *row, row_grad = random_row(layout)
        leaves = [x.requires_grad_() for x in row]
        dense = dense_attention(*leaves, layout, SCALE)
        expected = [dense, *torch.autograd.grad(dense, leaves, row_grad)]
        for comm_type, all_gather.CHUNKED_FROM_BYTES in cases:
            chunked = " in chunks" if all_gather.CHUNKED_FROM_BYTES == 0 else ""
            local = [x.detach()[mine].requires_grad_() for x in row]
            with late_transfers():
                out = context_parallel_attention(*local, layout, dist.group.WORLD, comm_type, SCALE, hierarchy)
                actual = [out, *torch.autograd.grad(out, local, row_grad[mine])]
            assert [x.shape for x in actual] == [x[mine].shape for x in expected]
            for name, a, b in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
                errors[f"{comm_type}{chunked} row {number} {name}"] = (a - b[mine]).abs().max().item()
    return errors


@pytest.mark.parametrize("cp_size", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_equals_dense_twin(cp_size: int) -> None:
    for rank, errors in enumerate(run_ranks(errors_of_rank, cp_size, cp_size)):
        comm_types = FLAT if cp_size == 2 else CP_COMM_TYPES
        assert len(errors) == 4 * (len(comm_types) + 1) * len(ROWS)
        for what, error in errors.items():
            assert error < 1e-12, f"rank {rank}, {what}: off by {error:.1e}"


def through_module(rank: int, comm_type: str, row_number: int) -> tuple[torch.Tensor, ...]:
    """bf16 output and gradients of one rank through the Megatron module, whose views are cut from one projection."""
    # Imported here: it takes seconds, and the ranks of the other test do without.
    from megatron.core.transformer import TransformerConfig

    from megatron_longpo.attention.core_attention import SharedPrefixAttention

    layout = layouts(2)[row_number]
    *row, row_grad = random_row(layout, torch.bfloat16)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        attention_dropout=0.0,
        context_parallel_size=2,
        cp_comm_type=comm_type,
        window_size=(layout.window_tokens - 1, 0) if layout.window_tokens else None,
    )
    groups = SimpleNamespace(cp=dist.group.WORLD)
    module = SharedPrefixAttention(config, pg_collection=groups)
    mine = layout.local_index(rank)
    fused = torch.cat([x[mine] for x in row], 1).unsqueeze(1).requires_grad_()
    query, key, value = fused.split((HEADS, GROUPS, GROUPS), 2)
    out = module(query, key, value, layout.to_tensor())  # which leaves the window to the module
    (grad,) = torch.autograd.grad(out, fused, row_grad[mine].flatten(1).unsqueeze(1))
    return out.detach().unflatten(2, (HEADS, -1)), *grad.split((HEADS, GROUPS, GROUPS), 2)


def messages() -> list[str]:
    """What the errors of a group of 2 say; they are raised before anything is sent."""
    layout = layouts(2)[0]
    q, k, v, _ = (x[layout.local_index(dist.get_rank())] for x in random_row(layout))
    said = []
    both, alone = dist.group.WORLD, [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    for arguments in (
        (q[:, :6], k[:, :3], v[:, :3], layout, dist.group.WORLD, "a2a", SCALE),
        (q, k, v, layout, dist.group.WORLD, "allgather", SCALE),
        (q, k, v, layout, dist.group.WORLD, "a2a+p2p", SCALE),
        (q, k, v, RowLayout(layout.documents, 4), dist.group.WORLD, "a2a", SCALE),
        (q[1:], k, v, layout, dist.group.WORLD, "all_gather", SCALE),
        (q[:, :6], k[:, :3], v[:, :3], layout, dist.group.WORLD, "a2a+p2p", SCALE, (both, alone)),
        (q, k, v, layout, dist.group.WORLD, "a2a+p2p", SCALE, (both, both)),
    ):
        with pytest.raises(ValueError) as raised:
            context_parallel_attention(*arguments)
        said.append(str(raised.value))
    return said


def ring_events() -> list[list[str]]:
    """What a ring of 2 does, in order: forward, recomputed with its results kept, backward; then with a window."""
    from megatron_longpo.attention import ring
    from megatron_longpo.attention.kept import KeptResults
    from megatron_longpo.attention.kernels import CpuFlashKernel

    events: list[str] = []

    def logged(owner: type, method: str, event: str) -> None:
        original = getattr(owner, method)

        def call(*args: Any) -> Any:
            events.append(f"{event} {args[1].shape[1]}" if event == "send" else event)
            return original(*args)

        setattr(owner, method, call)

    logged(ring._Ring, "send", "send")
    logged(ring._Transfer, "received", "received")
    logged(CpuFlashKernel, "forward", "kernel")
    logged(CpuFlashKernel, "backward", "kernel")
    phases = []
    for layout in (layouts(2)[0], layouts(2)[4]):
        mine = layout.local_index(dist.get_rank())
        *row, row_grad = (x[mine] for x in random_row(layout))
        local = [x.clone().requires_grad_() for x in row]
        kept = KeptResults()
        for recomputed in (False, True):
            events.clear()
            with torch.set_grad_enabled(recomputed), kept.in_use():
                out = context_parallel_attention(*local, layout, dist.group.WORLD, "p2p", SCALE)
            phases.append(events.copy())
        events.clear()
        out.backward(row_grad)
        phases.append(events.copy())
    return [[event for event, _ in itertools.groupby(phase)] for phase in phases]


def module_results_and_messages(rank: int) -> tuple[list[tuple[torch.Tensor, ...]], list[str], list[list[str]]]:
    return [through_module(rank, *case) for case in MODULE_CASES], messages(), ring_events()


def test_module_in_bf16_errors_and_the_order_of_a_ring() -> None:
    results = run_ranks(module_results_and_messages, 2)
    for number, (comm_type, row_number) in enumerate(MODULE_CASES):
        layout = layouts(2)[row_number]
        *leaves, row_grad = (x.double() for x in random_row(layout, torch.bfloat16))
        leaves = [x.requires_grad_() for x in leaves]
        dense = dense_attention(*leaves, layout, SCALE)
        expected = [dense.detach(), *torch.autograd.grad(dense, leaves, row_grad)]
        by_rank = [cases[number] for cases, _, _ in results]
        for name, parts, whole in zip(("out", "dq", "dk", "dv"), zip(*by_rank, strict=True), expected, strict=True):
            assert all(part.dtype == torch.bfloat16 for part in parts)
            actual = torch.cat(parts).squeeze(1)[layout.gathered_index()].double()
            error = ((actual - whole).norm() / whole.norm()).item()
            assert error < 1e-2, f"{comm_type} row {row_number} {name} is off by {error:.1e}"

    # A rank sends all of its true keys; where a window of 3 is enough, the last two of a chunk that others see.
    full, windowed = (38, 46), (6, 4)
    for rank, (_, said, phases) in enumerate(results):
        heads, comm_type, hierarchy, cp_size, tokens, inner_heads, product = said
        for sent, (forward, recomputed, backward) in zip((full, windowed), (phases[:3], phases[3:]), strict=True):
            own, gradients = f"send {sent[rank]}", f"send {sent[1 - rank]}"
            assert forward == [own, "kernel", "received", "kernel"], "keys travel while a step is computed"
            assert recomputed == []
            # The gradients of the other rank's keys go home at last.
            assert backward == [own, "kernel", "received", "kernel", gradients, "received"]
        assert "--cp-comm-type a2a" in heads and "3 key/value heads" in heads and "all_gather" in heads
        assert comm_type == "--cp-comm-type 'allgather' is not one of all_gather, a2a, p2p, a2a+p2p"
        assert hierarchy == "--cp-comm-type a2a+p2p needs --hierarchical-context-parallel-sizes"
        assert "laid out for 4 context-parallel ranks in a group of 2" in cp_size
        assert "for a layout of" in tokens
        assert "splits heads over 2 ranks, but 3 key/value heads" in inner_heads and "cp-comm-type p2p" in inner_heads
        assert product == "--hierarchical-context-parallel-sizes 2 2 must multiply to --context-parallel-size 2"


def test_heads_are_gathered_in_chunks_where_it_pays() -> None:
    assert len(all_gather.head_chunks(32, 8, 2**20)) == 1
    chunks = all_gather.head_chunks(32, 8, 2**30)
    assert [(c.keys, c.queries) for c in chunks[:2]] == [(slice(0, 2), slice(0, 8)), (slice(2, 4), slice(8, 16))]
    assert [len(all_gather.head_chunks(12, heads, 2**30)) for heads in (1, 2, 3, 6)] == [1, 2, 3, 3]


@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_orders_are_each_others_inverse(cp_size: int) -> None:
    cpu = torch.device("cpu")
    for layout in layouts(cp_size):
        row = torch.arange(layout.padded_tokens)
        by_rank = row[to_rank_order(layout, cpu)]
        assert torch.equal(by_rank, torch.cat([layout.local_index(rank) for rank in range(cp_size)]))
        assert torch.equal(by_rank[to_row_order(layout, cpu)], row)
