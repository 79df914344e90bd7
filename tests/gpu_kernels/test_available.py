"""Where Triton does not work torch's operators do, and it is said once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_longpo.gpu_kernels import available, has_kernels


@pytest.fixture(autouse=True)
def ask_again() -> Iterator[None]:
    available._triton_works.cache_clear()
    yield
    available._triton_works.cache_clear()


def on_cuda(dtype: torch.dtype = torch.bfloat16) -> Any:
    return SimpleNamespace(is_cuda=True, dtype=dtype, device=torch.device("cuda", 0))


def test_without_triton_it_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron_longpo.gpu_kernels.swiglu", None)
    with pytest.warns(UserWarning, match=r"kernels do not run here \(.*swiglu.*\): torch's operators") as said:
        assert not has_kernels(on_cuda()) and not has_kernels(on_cuda())
    assert len(said) == 1


def test_nothing_is_tried_for_tensors_that_no_kernel_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(available, "_triton_works", lambda device: pytest.fail("tried"))
    assert not has_kernels(torch.zeros(1)) and not has_kernels(on_cuda(torch.float64))
