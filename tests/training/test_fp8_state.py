"""States of fp8 in checkpoints: what is unpickled, and what is not."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_longpo.training.fp8_state import ALLOW, scaling_factors_allowed

FACTORS = {"scale_fwd": torch.ones(3), "amax_history_fwd": torch.zeros(4, 3), "extra_fp8_variables": {"num_gemms": 1}}


def as_tensor(content: bytes) -> torch.Tensor:
    """As Transformer Engine saves it."""
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def saved(content: Any) -> io.BytesIO:
    """As Transformer Engine 1 saved it."""
    file = io.BytesIO()
    torch.save(content, file)
    return file


class Harmful:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


class InStorage(Harmful):
    """The same, where a tensor's storage should be."""

    def __reduce__(self) -> Any:
        return torch.storage._load_from_bytes, (saved(Harmful(Path(self.folder))).getvalue(),)


@pytest.mark.parametrize(
    "value",
    [
        as_tensor(pickle.dumps(FACTORS)),
        torch.empty(0, dtype=torch.uint8),
        saved(FACTORS),
        saved(None),
        io.BytesIO(),
        None,
    ],
    ids=["pickled", "empty", "saved by 1", "none saved by 1", "empty file", "none"],
)
def test_scaling_factors_may_be_loaded_in_the_block_alone(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ALLOW, raising=False)
    with scaling_factors_allowed(Path("iter_0000004"), {"linear.weight": torch.ones(2), "linear._extra_state": value}):
        assert os.environ[ALLOW] == "1"
    assert ALLOW not in os.environ
    monkeypatch.setenv(ALLOW, "0")
    with scaling_factors_allowed(Path("iter_0000004"), {}):
        pass
    assert os.environ[ALLOW] == "0"


@pytest.mark.parametrize("kind", [Harmful, InStorage])
@pytest.mark.parametrize("file", [False, True])
def test_nothing_else_is_unpickled(kind: type[Harmful], file: bool, tmp_path: Path) -> None:
    harmful = FACTORS | {"recipe": kind(tmp_path / "made")}
    value = saved(harmful) if file else as_tensor(pickle.dumps(harmful))
    with (
        pytest.raises(ValueError, match=r"iter_0000004: linear\._extra_state is not what Transformer Engine saves"),
        scaling_factors_allowed(tmp_path / "iter_0000004", {"linear._extra_state": value}),
    ):
        pytest.fail("it was allowed")
    assert not (tmp_path / "made").exists()


def test_the_error_says_what_was_named(tmp_path: Path) -> None:
    state = {"linear._extra_state": as_tensor(pickle.dumps(Harmful(tmp_path / "made")))}
    with pytest.raises(ValueError, match=r"\(it names posix\.mkdir\), and is not unpickled; --transformer-impl local"):
        scaling_factors_allowed(tmp_path, state).__enter__()
