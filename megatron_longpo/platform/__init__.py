"""The only place that knows CUDA from CPU: the device, the backend, and the patches that Megatron-Core needs on a CPU.

Megatron-Core assumes CUDA in a few dozen places. On a machine without it `prepare` gives the modules listed in
`cpu_torch` a stand-in for the global name ``torch`` that answers for the CPU; ``torch`` itself stays untouched, and so
does every other package. On CUDA `prepare` only mends what is wrong there too (`repairs`, `checkpoint_writers`,
`optimizer_shards`).
Each adapter says when it can be removed. All were checked against the versions in `CHECKED_VERSIONS`.

Modules that import Megatron-Core import this package first: on a CPU it imports it without torch's compiler.
"""

from megatron_longpo.platform.attention import default_attention_backend, device_defaults, use_attention_backend
from megatron_longpo.platform.checkpoint_writers import prepare_write_results
from megatron_longpo.platform.cpu_patches import construction
from megatron_longpo.platform.devices import (
    device,
    device_name,
    has_cuda,
    peak_memory_gib,
    peak_pinned_memory_gib,
    synchronize,
)
from megatron_longpo.platform.megatron_core import CHECKED_VERSIONS
from megatron_longpo.platform.newer_megatron import async_save_options, mlp_submodules
from megatron_longpo.platform.preparation import prepare
from megatron_longpo.platform.profiles import around_waits, nsight_range, profiler_activities
from megatron_longpo.platform.transfers import HostCopy

__all__ = [
    "CHECKED_VERSIONS",
    "HostCopy",
    "around_waits",
    "async_save_options",
    "construction",
    "default_attention_backend",
    "device",
    "device_defaults",
    "device_name",
    "has_cuda",
    "mlp_submodules",
    "nsight_range",
    "peak_memory_gib",
    "peak_pinned_memory_gib",
    "prepare",
    "prepare_write_results",
    "profiler_activities",
    "synchronize",
    "use_attention_backend",
]
