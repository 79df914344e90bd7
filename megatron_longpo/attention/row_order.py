"""Between the order of a row and the order in which context-parallel ranks hold it, as index tensors on a device."""

from __future__ import annotations

from functools import lru_cache

import torch

from megatron_longpo.data.layout import RowLayout
from megatron_longpo.data.sending import sent

# Every layer of a pass asks for the same layout, and the schedules alternate between few of them.
_LAYOUTS_IN_FLIGHT = 8


@lru_cache(maxsize=_LAYOUTS_IN_FLIGHT)
def to_row_order(layout: RowLayout, device: torch.device) -> torch.Tensor:
    """int64 ``[padded_tokens]``: ``by_rank[index]`` puts the concatenation of all ranks' tokens into row order."""
    return sent(layout.gathered_index(), device)


@lru_cache(maxsize=_LAYOUTS_IN_FLIGHT)
def to_group_order(layout: RowLayout, num_groups: int, group: int, device: torch.device) -> torch.Tensor:
    """int64: ``by_rank[index]`` puts the tokens of a run of neighbouring ranks into `RowLayout.over`'s local order.

    Args:
        layout: The row over all ranks.
        num_groups: Groups of equally many neighbouring ranks; one group is one rank of ``layout.over(num_groups)``.
        group: Which of them.
        device: Where the index is used.
    """
    by_rank, together = _orders(layout, num_groups, group)
    order = torch.argsort(by_rank)
    return sent(order[torch.searchsorted(by_rank[order], together)], device)


@lru_cache(maxsize=_LAYOUTS_IN_FLIGHT)
def from_group_order(layout: RowLayout, num_groups: int, group: int, device: torch.device) -> torch.Tensor:
    """int64: the inverse of `to_group_order`."""
    return torch.argsort(to_group_order(layout, num_groups, group, device))


def _orders(layout: RowLayout, num_groups: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row indices of a group's tokens: rank after rank, and as one rank would hold them."""
    size = layout.cp_size // num_groups
    ranks = range(group * size, (group + 1) * size)
    return torch.cat([layout.local_index(rank) for rank in ranks]), layout.over(num_groups).local_index(group)


@lru_cache(maxsize=_LAYOUTS_IN_FLIGHT)
def to_rank_order(layout: RowLayout, device: torch.device) -> torch.Tensor:
    """int64 ``[padded_tokens]``: ``row[index]`` is the concatenation of all ranks' tokens, each in its local order."""
    return sent(torch.cat([layout.local_index(rank) for rank in range(layout.cp_size)]), device)
