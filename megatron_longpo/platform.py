"""The only file that knows CUDA from CPU: the device, the backend, and the patches that Megatron-Core needs on a CPU.

Megatron-Core assumes CUDA in a few dozen places. On a machine without it `prepare` gives the modules listed in
`_MODULES_THAT_NAME_CUDA` a stand-in for the global name ``torch`` that answers for the CPU; ``torch`` itself stays
untouched, and so does every other package. On CUDA `prepare` only mends what is wrong there too (`_fix_zero1_resume`,
`_tie_checkpoint_manager_to_its_rank`, `_group_ranks_without_einops`).
Each adapter says when it can be removed. All were checked against the versions in `CHECKED_VERSIONS`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import multiprocessing
import os
import resource
import sys
import types
from collections.abc import Callable, Iterator
from multiprocessing.managers import SyncManager
from typing import Any

import torch
from packaging.version import Version
from torch.overrides import TorchFunctionMode

from megatron_longpo.processes import die_with_parent


@contextlib.contextmanager
def _without_compiler() -> Iterator[None]:
    """Megatron-Core wraps a few fused functions in ``torch.compile`` when it is imported; without CUDA none is called.

    Loading the compiler takes as long as loading torch, in every process. Remove when upstream wraps them lazily.
    """
    compiler = torch.compile
    torch.compile = lambda model=None, **_: (lambda function: function) if model is None else model  # type: ignore
    try:
        yield
    finally:
        torch.compile = compiler


# Modules that import Megatron-Core import this one first.
with contextlib.nullcontext() if torch.cuda.is_available() else _without_compiler():
    import megatron.core

CHECKED_VERSIONS = ("0.16", "0.19")
"""Megatron-Core release series on which the adapters below were run."""

_MODULES_THAT_NAME_CUDA = (
    "utils",
    "models.common.embeddings.rotary_pos_embedding",
    "tensor_parallel.mappings",
    "tensor_parallel.layers",
    "tensor_parallel.utils",
    "tensor_parallel.random",
    "pipeline_parallel.schedules",
    "pipeline_parallel.p2p_communication",
    "distributed.param_and_grad_buffer",
    "distributed.distributed_data_parallel",
    "distributed.finalize_model_grads",
    "optimizer.optimizer",
    "optimizer.clip_grads",
    "optimizer.distrib_optimizer",
    "parallel_state",
    "dist_checkpointing.strategies.filesystem_async",
    "dist_checkpointing.strategies.state_dict_saver",
    "dist_checkpointing.strategies.async_utils",
    "dist_checkpointing.strategies.fully_parallel",
    "dist_checkpointing.exchange_utils",
)

_prepared = False


def has_cuda() -> bool:
    """Whether this process computes on CUDA. ``LONGPO_USE_CPU=1`` hides the GPU, as ``--use-cpu`` does."""
    return torch.cuda.is_available() and os.environ.get("LONGPO_USE_CPU") != "1"


def device() -> torch.device:
    """This rank's device: ``cuda:LOCAL_RANK``, or the CPU."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if has_cuda() else torch.device("cpu")


def device_name() -> str:
    """What the device calls itself."""
    return torch.cuda.get_device_name(device()) if has_cuda() else "CPU"


def default_backend() -> str:
    """The collective backend of `device`."""
    return "nccl" if has_cuda() else "gloo"


def default_transformer_impl() -> str:
    """``transformer_engine`` where it can run, else ``local``."""
    if has_cuda() and importlib.util.find_spec("transformer_engine") is not None:
        return "transformer_engine"
    return "local"


def synchronize() -> None:
    """Wait for the device's queued work; nothing to wait for on a CPU."""
    if has_cuda():
        torch.cuda.synchronize()


def profiler_activities() -> list[torch.profiler.ProfilerActivity]:
    """What a profile records: the host, and the device where there is one."""
    activity = torch.profiler.ProfilerActivity
    return [activity.CPU, activity.CUDA] if has_cuda() else [activity.CPU]


@contextlib.contextmanager
def nsight_range() -> Iterator[None]:
    """What runs inside is captured by ``nsys profile --capture-range=cudaProfilerApi``, with its named ranges."""
    with torch.autograd.profiler.emit_nvtx():
        torch.cuda.cudart().cudaProfilerStart()
        try:
            yield
        finally:
            torch.cuda.cudart().cudaProfilerStop()


@contextlib.contextmanager
def around_waits(make_context: Callable[[], contextlib.AbstractContextManager[Any]]) -> Iterator[None]:
    """Wait for collectives, whoever waits, in a context of its own: what a profile shows as communication on a CPU.

    Remove when torch's profiler has a range for ``Work.wait``.
    """
    work: Any = torch.distributed.Work
    wait = work.wait

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with make_context():
            return wait(*args, **kwargs)

    work.wait = wrapped
    try:
        yield
    finally:
        work.wait = wait


def peak_memory_gib() -> float:
    """Peak memory of this process: allocated CUDA memory, or the resident set on a CPU. GiB."""
    if has_cuda():
        return torch.cuda.max_memory_allocated() / 2**30
    kib_per_unit = 1 / 1024 if sys.platform == "darwin" else 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kib_per_unit / 2**20


class HostCopy:
    """A copy of a device's tensor in pinned host memory, made and brought back behind computation.

    On a CPU it is a plain copy in the same memory: it saves nothing there, and behaves the same.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._device = tensor.device
        self._returned: torch.Tensor | None = None
        if not tensor.is_cuda:
            self._host = tensor.clone()
            return
        to_host, _ = _copy_streams()
        to_host.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(to_host):
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._made = to_host.record_event()
        # The allocator must not give the memory away before it is copied.
        tensor.record_stream(to_host)

    def start_return(self) -> None:
        """Start to copy back."""
        if self._returned is not None:
            return
        if self._device.type != "cuda":
            self._returned = self._host
            return
        _, to_device = _copy_streams()
        to_device.wait_event(self._made)
        with torch.cuda.stream(to_device):
            self._returned = self._host.to(self._device, non_blocking=True)
            self._arrived = to_device.record_event()

    def tensor(self) -> torch.Tensor:
        """The tensor on its device; work queued from now on waits for it."""
        self.start_return()
        assert self._returned is not None
        if self._device.type == "cuda":
            torch.cuda.current_stream().wait_event(self._arrived)
            self._returned.record_stream(torch.cuda.current_stream())
        return self._returned


@functools.cache
def _copy_streams() -> tuple[Any, Any]:
    """To the host and to the device: a bus carries both at once."""
    return torch.cuda.Stream(), torch.cuda.Stream()


def pipeline_options(pipeline_size: int, interleaved: bool) -> dict[str, bool]:
    """TransformerConfig fields for point-to-point transfers.

    With two pipeline ranks both neighbours are the same rank, and gloo matches messages by order alone: the batched
    transfers of the interleaved schedule then cross and give silently wrong results. The overlapped form is right.
    """
    if not has_cuda() and interleaved and pipeline_size == 2:
        return {"batch_p2p_comm": False, "overlap_p2p_comm": True}
    return {"batch_p2p_comm": not interleaved, "overlap_p2p_comm": interleaved}


def prepare(use_cpu: bool = False) -> None:
    """Make this process ready for Megatron-Core on its device. Call it once, before any model is built.

    Args:
        use_cpu: Hide the GPU.

    Raises:
        RuntimeError: On a CPU with a Megatron-Core release that the adapters were not checked against.
    """
    global _prepared
    if use_cpu:
        os.environ["LONGPO_USE_CPU"] = "1"
    if has_cuda():
        torch.cuda.set_device(device())
    if _prepared:
        return
    _require_checked_version()
    if not has_cuda():
        for name in _MODULES_THAT_NAME_CUDA:
            # A stand-in whose module moved in a later release has nothing to stand in for.
            with contextlib.suppress(ModuleNotFoundError):
                importlib.import_module(f"megatron.core.{name}").torch = _CpuTorch()  # type: ignore[attr-defined]
        _use_cpu_rng_tracker()
        _replace_grad_clipping()
    _group_ranks_without_einops()
    _fix_zero1_resume()
    _tie_checkpoint_manager_to_its_rank()
    _prepared = True


def _require_checked_version() -> None:
    version = Version(megatron.core.__version__)
    if f"{version.major}.{version.minor}" not in CHECKED_VERSIONS and not has_cuda():
        raise RuntimeError(
            f"megatron-core {version} was not checked on a CPU; checked: {', '.join(CHECKED_VERSIONS)}. Install one "
            "of these, or run the test suite and add the version to CHECKED_VERSIONS in megatron_longpo/platform.py."
        )


class _CpuCuda:
    """Answers what Megatron asks of ``torch.cuda`` as a machine whose only device is the CPU would."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    @staticmethod
    def current_device() -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def _nothing(*args: Any, **kwargs: Any) -> None:
        return None

    synchronize = empty_cache = set_device = _nothing
    current_stream = default_stream = _nothing

    get_rng_state = staticmethod(lambda device=None: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, device=None: torch.set_rng_state(state))
    manual_seed = staticmethod(torch.manual_seed)


class _CpuTorch(types.ModuleType):
    """``torch``, with tensor factories that put ``device="cuda"`` on the CPU.

    Remove when Megatron-Core asks its configuration for the device instead of naming CUDA.
    """

    _FACTORIES = ("empty", "zeros", "ones", "full", "tensor", "arange", "rand", "randn", "empty_like", "zeros_like")

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = _CpuCuda()
        for name in self._FACTORIES:
            setattr(self, name, self._on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def create(*args: Any, **kwargs: Any) -> torch.Tensor:
            if str(kwargs.get("device", "")).startswith("cuda"):
                kwargs["device"] = "cpu"
            return factory(*args, **kwargs)

        return create


def _use_cpu_rng_tracker() -> None:
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


def _replace_grad_clipping() -> None:
    """Clip fp32 gradients without the CUDA multi-tensor kernels.

    Remove when ``clip_grad_by_total_norm_fp32`` no longer asserts a CUDA tensor type.
    """
    from megatron.core.optimizer import clip_grads, optimizer

    def clip_grad_by_total_norm_fp32(
        parameters: Any, max_norm: float, total_norm: float, use_decoupled_grad: bool = False
    ) -> None:
        scale = max_norm / (total_norm + 1.0e-6)
        if scale < 1.0:
            name = "decoupled_grad" if use_decoupled_grad else "grad"
            parameters = [parameters] if isinstance(parameters, torch.Tensor) else parameters
            torch._foreach_mul_([getattr(p, name) for p in parameters if getattr(p, name, None) is not None], scale)

    for module in (clip_grads, optimizer):
        module.clip_grad_by_total_norm_fp32 = clip_grad_by_total_norm_fp32


def _group_ranks_without_einops() -> None:
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


def _fix_zero1_resume() -> None:
    """Make the distributed optimizer resume exactly when torch's AdamW runs inside it (no TE or Apex at hand).

    Upstream asserts on a state without ``step``, misses ``step`` when it copies loaded state, and gives all parameters
    ONE ``step`` tensor, which then advances once per parameter: the resumed run is silently wrong.
    Remove when a resumed run under torch AdamW equals an uninterrupted one upstream.
    """
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    upstream = distrib_optimizer.DistributedOptimizer
    state_dict, load_state_dict = upstream.state_dict, upstream.load_state_dict
    set_states = upstream._set_main_param_and_optimizer_states

    def is_torch_adam(self: Any) -> bool:
        return isinstance(self.optimizer, torch.optim.Adam | torch.optim.AdamW)

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
        return state_dict(self)

    def fixed_load_state_dict(self: Any, state: Any) -> None:
        if not is_torch_adam(self):
            return load_state_dict(self, state)
        allocate_state(self)
        load_state_dict(self, state)
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


def _tie_checkpoint_manager_to_its_rank() -> None:
    """Let the process that carries results of checkpoint writers end with its rank, also when that is killed.

    Remove when Megatron's writer needs no manager process, or ends it itself.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    def results_queue() -> Any:
        if filesystem_async._results_queue is None:
            manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
            manager.start(initializer=die_with_parent)
            filesystem_async._results_queue = manager.Queue()
        return filesystem_async._results_queue

    filesystem_async._get_write_results_queue = results_queue


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
