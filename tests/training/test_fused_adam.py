"""AdamW in one kernel: the steps, counts and state of an AdamW that was left alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_longpo.training.fused_adam import fuse_adam


def adam(params: list[torch.nn.Parameter], fused: bool) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW(params, lr=0.1, weight_decay=0.1)
    if fused:
        fuse_adam(SimpleNamespace(optimizer=optimizer))
    return optimizer


def weights() -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 4), (5,), (2,))]


def step(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], number: int) -> None:
    torch.manual_seed(number)
    for index, param in enumerate(params):
        # One has its first gradient in the second step, and one none in the third.
        param.grad = None if (index, number) in ((1, 0), (2, 2)) else torch.randn(param.shape)
    optimizer.step()


def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counts: list[int] = []
    kernel = torch._fused_adamw_

    def counted(params: Any, *args: Any, **kwargs: Any) -> None:
        counts.append(len(params))
        kernel(params, *args, **kwargs)

    monkeypatch.setattr(torch, "_fused_adamw_", counted)
    return counts


def test_equals_an_adam_that_was_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = calls(monkeypatch)
    ours, theirs = weights(), weights()
    fused, plain = adam(ours, True), adam(theirs, False)
    for number in range(5):
        if number == 3:
            # A checkpoint goes from either to the other.
            states = plain.state_dict(), fused.state_dict()
            ours, theirs = ([torch.nn.Parameter(p.detach().clone()) for p in ps] for ps in (theirs, ours))
            fused, plain = adam(ours, True), adam(theirs, False)
            fused.load_state_dict(states[0])
            plain.load_state_dict(states[1])
        step(fused, ours, number)
        step(plain, theirs, number)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        a, b = fused.state_dict(), plain.state_dict()
        assert a["param_groups"] == b["param_groups"]
        assert [s["step"] for s in a["state"].values()] == [s["step"] for s in b["state"].values()]
    assert counts == [2, 3, 2, 3, 3]
