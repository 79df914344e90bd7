"""Saved tensors that must not change: autograd's own check, where hooks take its place.

Autograd refuses to use a saved tensor that was changed in place since. It cannot tell where hooks saved it in its
stead: there a change would silently give wrong gradients.
"""

from __future__ import annotations

import torch


class Unchanged:
    """A tensor as it is now.

    Args:
        tensor: Kept itself, not copied.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor, self._version = tensor, tensor._version

    @property
    def is_so(self) -> bool:
        """Whether nothing has written to the tensor, or to a view of it."""
        return self._tensor._version == self._version

    def tensor(self) -> torch.Tensor:
        """The tensor.

        Raises:
            RuntimeError: It was changed in place.
        """
        if not self.is_so:
            raise RuntimeError(
                f"a tensor {tuple(self._tensor.shape)} of {self._tensor.dtype} that is kept for the backward pass was "
                f"changed in place: it is at version {self._tensor._version}, expected {self._version}. Let the "
                "operator that writes to it make a new tensor"
            )
        return self._tensor
