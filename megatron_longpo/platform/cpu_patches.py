"""Patches that let Megatron-Core train on a CPU: its random states, optimizers, gradient clipping, and type names."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_longpo.platform.devices import has_cuda


def use_cpu_rng_tracker() -> None:
    """Let Megatron's random-state tracker fork the CPU generator.

    Remove when ``CudaRNGStatesTracker`` takes a generator.
    """
    from megatron.core.tensor_parallel import random

    class CpuRNGStatesTracker(random.CudaRNGStatesTracker):
        # Upstream's fork warns when the CPU generator moves, which here is the point.
        @contextlib.contextmanager
        def fork(self, name: str = random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
            if name not in self.states_:
                raise RuntimeError(f"random state {name!r} was not added; call model_parallel_cuda_manual_seed first")
            outer = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outer)

    random._get_cuda_rng_state = lambda device="cpu", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    random._CUDA_RNG_STATE_TRACKER = CpuRNGStatesTracker()
    random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True


def use_torch_optimizers() -> None:
    """Where a GPU is hidden, leave the optimizers of Transformer Engine and Apex alone, whose kernels need it.

    Megatron takes them, and their norm and scaling of gradients, wherever they can be imported, which is where there is
    a GPU. Remove when it chooses by the parameters' device.
    """
    if not torch.cuda.is_available():
        return
    from megatron.core import optimizer as package
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer

    # What these modules set themselves where they find neither of the two.
    package.Adam, package.SGD, package.USING_PYTORCH_OPTIMIZER = torch.optim.AdamW, torch.optim.SGD, True
    distrib_optimizer.Adam = torch.optim.Adam
    distrib_optimizer.HAVE_APEX_OR_TE = False
    distrib_optimizer.USING_TE_OPTIMIZER = distrib_optimizer.USING_APEX_OPTIMIZER = False
    for module in (clip_grads, optimizer):
        module.multi_tensor_applier = utils.local_multi_tensor_applier
        module.multi_tensor_scale_impl = utils.local_multi_tensor_scale
    clip_grads.l2_norm_impl = utils.local_multi_tensor_l2_norm
    clip_grads.multi_tensor_scale_tensor_impl = None  # of 0.19


def replace_grad_clipping() -> None:
    """Clip fp32 gradients without the CUDA multi-tensor kernels.

    Remove when ``clip_grad_by_total_norm_fp32`` no longer asserts a CUDA tensor type.
    """
    from megatron.core.optimizer import clip_grads, optimizer

    def clip_grad_by_total_norm_fp32(
        parameters: Any, max_norm: float, total_norm: float | torch.Tensor, use_decoupled_grad: bool = False
    ) -> None:
        scale = max_norm / (float(total_norm) + 1.0e-6)
        if scale < 1.0:
            name = "decoupled_grad" if use_decoupled_grad else "grad"
            parameters = [parameters] if isinstance(parameters, torch.Tensor) else parameters
            torch._foreach_mul_([getattr(p, name) for p in parameters if getattr(p, name, None) is not None], scale)

    for module in (clip_grads, optimizer):
        module.clip_grad_by_total_norm_fp32 = clip_grad_by_total_norm_fp32


class _CudaTypeNames(TorchFunctionMode):
    """Tensors say ``torch.cuda.FloatTensor`` of themselves, and ``.cuda()`` leaves them where they are.

    The optimizers choose a parameter's treatment by the type's name, and tied embeddings are moved with ``.cuda()``.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return result.replace("torch.", "torch.cuda.", 1)
        return result


@contextlib.contextmanager
def construction() -> Iterator[None]:
    """Wrap the building of models and optimizers in this; it does nothing on CUDA.

    Remove when Megatron's optimizers look at ``dtype`` instead of ``Tensor.type()``.
    """
    with contextlib.nullcontext() if has_cuda() else _CudaTypeNames():
        yield
