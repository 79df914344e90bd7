"""torch's AdamW in one kernel, for runs on a GPU without Transformer Engine's FusedAdam."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer


def fuse_adam(optimizer: MegatronOptimizer) -> None:
    """Let every AdamW of torch's in Megatron's optimizer update its weights in one kernel.

    By itself it goes over lists of tensors, a dozen times, with a temporary of all weights in fp32. Between steps the
    parameter groups and step counts are those of an optimizer that was left alone, so checkpoints are the same and load
    on either side. Nothing waits for the device, except where counts were loaded.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        adam: Any = getattr(part, "optimizer", None)  # None on a rank without weights
        if type(adam) in (torch.optim.Adam, torch.optim.AdamW):
            fused = _Fused()
            adam.register_step_pre_hook(fused.before_step)
            adam.register_step_post_hook(fused.after_step)


class _Fused:
    """The hooks of one optimizer: the kernel counts steps on the device, everybody else on the host."""

    def __init__(self) -> None:
        self._counts: dict[torch.nn.Parameter, tuple[torch.Tensor, torch.Tensor]] = {}  # host, device

    def before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Switch the kernel on and give it its counts."""
        for group in optimizer.param_groups:
            group["fused"], group["foreach"] = True, False
            for param in group["params"]:
                on_host = optimizer.state.get(param, {}).get("step")
                if on_host is None:
                    continue  # before the first step
                if param not in self._counts or self._counts[param][0] is not on_host:
                    self._counts[param] = on_host, on_host.to(param.device, torch.float32, copy=True)
                optimizer.state[param]["step"] = self._counts[param][1]

    def after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Leave groups and counts as an optimizer without the hooks leaves them."""
        for group in optimizer.param_groups:
            group["fused"] = group["foreach"] = None
            for param in group["params"]:
                state = optimizer.state.get(param)
                if not state:
                    continue
                if param not in self._counts:
                    self._counts[param] = torch.tensor(0.0), state["step"]
                on_host = self._counts[param][0]
                if param.grad is not None:
                    on_host += 1
                state["step"] = on_host
