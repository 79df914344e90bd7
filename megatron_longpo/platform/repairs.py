"""What is mended in Megatron-Core on every device."""

from __future__ import annotations

import types
from typing import Any

import torch
from packaging.version import Version


def group_ranks_without_einops() -> None:
    """Let hierarchical context-parallel groups be made where einops is not installed: Megatron does not require it.

    Remove when ``create_hierarchical_groups`` does without.
    """
    from megatron.core import parallel_state

    if parallel_state.HAVE_EINOPS:
        return

    def rearrange(ranks: Any, pattern: str, u: int, s: int, l: int) -> Any:  # noqa: E741  the names of the pattern
        assert pattern == "(l s u) -> (l u) s", f"einops is not installed and was asked for {pattern!r}"
        return ranks.reshape(l, s, u).swapaxes(1, 2).reshape(l * u, s)

    parallel_state.einops = types.SimpleNamespace(rearrange=rearrange)
    parallel_state.HAVE_EINOPS = True


def count_missing_te_as_old() -> None:
    """Where Transformer Engine is not installed, "at least version 2.1?" is answered with no.

    0.16 compares with None, and so fails on ``--optimizer-cpu-offload``, which does not need it. Remove with 0.16.
    """
    from megatron.core import utils

    if utils.get_te_version() is None:
        utils.get_te_version = lambda: Version("0.0.0")


def fix_zero1_resume() -> None:
    """Make the distributed optimizer resume exactly when torch's AdamW runs inside it (no TE or Apex at hand).

    Upstream asserts on a state without ``step``, misses ``step`` when it copies loaded state, and gives all parameters
    ONE ``step`` tensor, which then advances once per parameter: the resumed run is silently wrong. The hybrid optimizer
    of ``--optimizer-cpu-offload`` has the first and the last of these.
    Remove when a resumed run under torch AdamW equals an uninterrupted one upstream.
    """
    from megatron.core.optimizer import HybridDeviceOptimizer, distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    upstream = distrib_optimizer.DistributedOptimizer
    state_dict, load_state_dict = upstream.state_dict, upstream.load_state_dict
    set_states = upstream._set_main_param_and_optimizer_states

    def is_torch_adam(self: Any) -> bool:
        return isinstance(self.optimizer, torch.optim.Adam | torch.optim.AdamW)

    def is_hybrid(self: Any) -> bool:
        return isinstance(self.optimizer, HybridDeviceOptimizer)

    def allocate_state(self: Any) -> None:
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                state = self.optimizer.state[param]
                if "step" not in state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"] = torch.zeros_like(param)
                    state["exp_avg_sq"] = torch.zeros_like(param)

    def fixed_state_dict(self: Any) -> Any:
        if is_torch_adam(self):
            allocate_state(self)
        elif is_hybrid(self) and not self.optimizer.state:
            # It makes its state in a step; what that step writes is about to be loaded over.
            self.optimizer.dummy_step()
        return state_dict(self)

    def fixed_load_state_dict(self: Any, state: Any) -> None:
        if is_torch_adam(self):
            allocate_state(self)
        load_state_dict(self, state)
        if is_torch_adam(self) or is_hybrid(self):
            for param_state in self.optimizer.state.values():
                param_state["step"] = param_state["step"].clone()

    def fixed_set_states(self: Any, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        if is_torch_adam(self):
            group, order = self.model_param_group_index_map[model_param]
            own = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
            tensors = {**tensors, "step": own["step"]}
        set_states(self, model_param, tensors)

    upstream.state_dict = fixed_state_dict
    upstream.load_state_dict = fixed_load_state_dict
    upstream._set_main_param_and_optimizer_states = fixed_set_states


def let_hybrid_optimizer_resume() -> None:
    """Make ``--optimizer-cpu-offload`` resume exactly, with torch's AdamW or TE's FusedAdam for the weights on the GPU.

    FusedAdam counts steps in its parameter groups. Upstream writes the checkpoint's count into the groups of the whole,
    and those over FusedAdam's before every step, so that its bias correction stays at that step for ever. And upstream
    takes an AdamW for a sign of the host when it moves what was loaded.
    Remove when ``HybridDeviceOptimizer`` leaves ``step`` to who counts it, and moves state to its parameter's device.
    """
    from megatron.core.optimizer import HybridDeviceOptimizer

    sync_groups = HybridDeviceOptimizer._sync_hdo_param_groups_to_sub_optimizers

    def sync_groups_and_forget_step(self: Any) -> None:
        sync_groups(self)
        for group in self.param_groups:
            group.pop("step", None)

    def move_state_to_parameters(self: Any) -> None:
        for optimizer in self.sub_optimizers:
            for param, state in optimizer.state.items():
                # One dictionary for both optimizers, as upstream has it.
                state.update({name: v.to(param.device) for name, v in state.items() if isinstance(v, torch.Tensor)})

    HybridDeviceOptimizer._sync_hdo_param_groups_to_sub_optimizers = sync_groups_and_forget_step
    HybridDeviceOptimizer._move_new_state_to_right_device = move_state_to_parameters


def norm_gradients_without_waiting() -> None:
    """Compute the norm of all gradients on the device, and ask for one number.

    Without TE and Apex upstream asks for the norm of every gradient: the host waits for the device once per weight.
    Remove when ``local_multi_tensor_l2_norm`` does not.
    """
    from megatron.core.optimizer import clip_grads
    from megatron.core.utils import local_multi_tensor_l2_norm

    if clip_grads.l2_norm_impl is not local_multi_tensor_l2_norm:
        return

    def l2_norm(chunk_size: int, noop_flag: Any, tensor_lists: list[list[torch.Tensor]], *_: Any) -> Any:
        norms = torch._foreach_norm([tensor for tensors in tensor_lists for tensor in tensors])
        return torch.linalg.vector_norm(torch.stack(norms)).float()[None], None

    clip_grads.l2_norm_impl = l2_norm


def pin_weights_on_host() -> None:
    """Keep the master weights of ``--optimizer-cpu-offload`` in pinned memory, from where they are copied back.

    Upstream pins the bf16 copy and then makes the fp32 one from it, in ordinary memory: every copy to the GPU is then
    slow and waited for, with ``--overlap-cpu-optimizer-d2h-h2d`` too. Remove when it pins the one that it keeps.
    """
    from megatron.core.optimizer import HybridDeviceOptimizer

    upstream = HybridDeviceOptimizer._get_sub_optimizer_param_groups

    def param_groups(self: Any, offload_fraction: float) -> Any:
        made = upstream(self, offload_fraction)
        on_host = made[0]
        for group in on_host:
            for param in group["params"]:
                param.data = param.data.pin_memory()
        return made

    HybridDeviceOptimizer._get_sub_optimizer_param_groups = param_groups


def let_checkpoints_name_optimizers() -> None:
    """Read checkpoints of ``--optimizer-cpu-offload``, whose parameter groups name the classes of both optimizers.

    Remove when Megatron's ``SAFE_GLOBALS`` has them.
    """
    from megatron.core import optimizer

    torch.serialization.add_safe_globals([optimizer.Adam, optimizer.CPUAdam])
