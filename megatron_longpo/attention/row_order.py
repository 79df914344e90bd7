"""Between the order of a row and the order in which context-parallel ranks hold it, as index tensors on a device."""

from __future__ import annotations

from functools import lru_cache

import torch

from megatron_longpo.data.layout import RowLayout

# Every layer of a pass asks for the same layout, and the schedules alternate between few of them.
_LAYOUTS_IN_FLIGHT = 8


@lru_cache(maxsize=_LAYOUTS_IN_FLIGHT)
def to_row_order(layout: RowLayout, device: torch.device) -> torch.Tensor:
    """int64 ``[padded_tokens]``: ``by_rank[index]`` puts the concatenation of all ranks' tokens into row order."""
    return layout.gathered_index().to(device)


@lru_cache(maxsize=_LAYOUTS_IN_FLIGHT)
def to_rank_order(layout: RowLayout, device: torch.device) -> torch.Tensor:
    """int64 ``[padded_tokens]``: ``row[index]`` is the concatenation of all ranks' tokens, each in its local order."""
    return torch.cat([layout.local_index(rank) for rank in range(layout.cp_size)]).to(device)
