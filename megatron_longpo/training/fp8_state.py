"""fp8's scaling factors in checkpoints: Transformer Engine pickles them, and nothing but them may be unpickled."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

ALLOW = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
"""Without this variable Transformer Engine refuses from 2.16 on to load the states of delayed scaling at all; earlier
versions unpickle whatever they are given (``transformer_engine/pytorch/_extra_state.py``)."""

_RECIPES = "transformer_engine.common.recipe"

_STORAGES = {("torch.storage", "_load_from_bytes"), ("megatron.core.safe_globals", "safe_load_from_bytes")}
"""What makes a tensor's storage; megatron-core 0.19 puts its own in the place of torch's, which unpickles anything."""

_HARMLESS = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("megatron.core.extensions.transformer_engine", "TEDelayedScaling"),  # a recipe
}


@contextmanager
def scaling_factors_allowed(checkpoint: Path, state: Mapping[str, Any]) -> Iterator[None]:
    """Let Transformer Engine's modules load their pickled states in this block, after a look at what is in them.

    Args:
        checkpoint: Where the states come from, for the error.
        state: What ``load_state_dict`` is given.

    Raises:
        ValueError: A state names something that is no part of scaling factors: unpickled, it could run any code.
    """
    for name, value in state.items():
        if not name.endswith("_extra_state"):
            continue
        try:
            if isinstance(value, torch.Tensor) and value.numel():
                _ScalingFactors(io.BytesIO(value.cpu().numpy().tobytes())).load()
            elif isinstance(value, io.BytesIO) and value.getbuffer().nbytes:  # of Transformer Engine before 2
                torch.load(io.BytesIO(value.getvalue()), map_location="cpu", weights_only=True)
        # What a damaged pickle asks for may fail with an error of any type.
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"{checkpoint}: {name} is not what Transformer Engine saves of fp8 ({reason}), and is not unpickled; "
                "--transformer-impl local, without --fp8-format, loads the rest"
            ) from error
    before = os.environ.get(ALLOW)
    os.environ[ALLOW] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[ALLOW]
        else:
            os.environ[ALLOW] = before


class _ScalingFactors(pickle.Unpickler):
    """Makes recipes, numbers and tensors, and nothing else: a checkpoint may come from anywhere."""

    def find_class(self, module: str, name: str) -> Any:
        """A class of recipes, or what a tensor is made with; UnpicklingError for everything else."""
        if (module, name) in _STORAGES:
            return _storage
        if (module, name) in _HARMLESS:
            return super().find_class(module, name)
        if module == _RECIPES and "." not in name:
            found = super().find_class(module, name)
            # What a module merely imports is not its own.
            if isinstance(found, type) and found.__module__ == module:
                return found
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _storage(content: bytes) -> Any:
    """Either of `_STORAGES`, without pickles of anything else."""
    return torch.load(io.BytesIO(content), weights_only=True)
