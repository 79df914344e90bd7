"""Where a parameter lies in one of Megatron's ``torch_dist`` checkpoints.

The format is that of ``torch.distributed.checkpoint``: ``.metadata`` says in which ``.distcp`` file every rectangle of
every tensor lies. Layers are stacked: layer n of ``decoder.layers.self_attention.linear_qkv.weight`` is its row n.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from megatron_longpo.conversion.layouts import Shape


@dataclass(frozen=True)
class Place:
    """Where a parameter lies in a checkpoint.

    Args:
        key: Name of the stored tensor.
        layer: Row of the stack of layers, or None outside the layers.
        num_layers: Height of the stack.
    """

    key: str
    layer: int | None = None
    num_layers: int = 0

    def box(self, shape: Shape) -> ChunkStorageMetadata:
        """The rectangle of a parameter of this shape."""
        if self.layer is None:
            return ChunkStorageMetadata(torch.Size([0] * len(shape)), torch.Size(shape))
        return ChunkStorageMetadata(torch.Size([self.layer] + [0] * len(shape)), torch.Size([1, *shape]))

    def stored_shape(self, shape: Shape) -> torch.Size:
        """Shape of the whole stored tensor."""
        return torch.Size(shape if self.layer is None else (self.num_layers, *shape))
