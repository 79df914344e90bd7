"""What Megatron-Core does otherwise from 0.19 on than in 0.16, where the rest of this package knows only one way."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
import types
from typing import Any


def do_without_triton() -> None:
    """Let Megatron-Core be imported where torch has no triton, as in its CPU build. Call before Megatron is imported.

    From 0.19 on every import of it ends in two kernels of mixtures of experts that import triton unasked. They are left
    out, as nothing here calls them; whatever else of Megatron-Core uses triton looks for it first.
    Remove when ``moe/ops/paged_stash.py`` does so too.
    """
    if sys.modules.get("triton") is None and importlib.util.find_spec("triton") is None:
        kernels = types.ModuleType("megatron.core.transformer.moe.ops.paged_stash")
        vars(kernels).update(GLOBAL_BLOCK_SIZE=0, paged_stash_copy_kernel=None, paged_stash_pop_kernel=None)
        sys.modules[kernels.__name__] = kernels


def let_blocks_recompute_themselves() -> None:
    """Full recomputation asks the block's own ``_checkpointed_forward``, as in 0.16, where the block has one.

    From 0.19 on it is a function of a module, so that a subclass can no longer bring its own.
    Remove when it can, or when 0.16 is gone and Megatron has another place for it.
    """
    from megatron.core.transformer import transformer_block

    upstream = getattr(transformer_block, "checkpointed_forward", None)
    if upstream is None:
        return

    def checkpointed_forward(block: Any, *args: Any, **kwargs: Any) -> Any:
        own = getattr(block, "_checkpointed_forward", None)
        return upstream(block, *args, **kwargs) if own is None else own(*args, **kwargs)

    transformer_block.checkpointed_forward = checkpointed_forward


def name_the_cause_of_failed_writes() -> None:
    """A checkpoint file that cannot be written fails with its reason ("No space left on device").

    From 0.19 on the first writer of a rank runs in its caller, where the reason is replaced by the exception's type.
    Remove when ``write_preloaded_data_multithread`` keeps it.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    writer = filesystem_async.FileSystemWriterAsync
    upstream = writer.write_preloaded_data

    def write_preloaded_data(*args: Any, **kwargs: Any) -> Any:
        result = upstream(*args, **kwargs)
        if result is not None and isinstance(result[1], Exception):
            raise result[1]
        return result

    writer.write_preloaded_data = staticmethod(write_preloaded_data)


def match_groups_without_rates() -> None:
    """Find a checkpoint's parameter groups by what tells them apart, with weight decay or without.

    From 0.19 on learning rates belong to a group's identity too, so that a run with another ``--lr`` cannot be resumed.
    Remove when they do not, or when groups of different learning rates are supported here.
    """
    from megatron.core.optimizer import distrib_optimizer, optimizer

    for module in (distrib_optimizer, optimizer):
        keys = getattr(module, "param_group_identifier_keys", ())
        if "max_lr" in keys:
            rates = ("max_lr", "min_lr", "start_wd", "end_wd")
            module.param_group_identifier_keys = tuple(key for key in keys if key not in rates)


def async_save_options() -> dict[str, str]:
    """Arguments of ``dist_checkpointing.save`` by which Megatron-Core itself writes in the background.

    From 0.19 on that is the work of another package unless it is asked for; its own one is said to go in time.
    """
    from megatron.core import dist_checkpointing

    named = "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
    return {"async_strategy": "mcore"} if named else {}


def mlp_submodules(mlp: Any) -> Any:
    """The submodules in a layer's spec of its MLP: from 0.19 on a function with arguments in place of a spec."""
    return mlp.keywords["submodules"] if isinstance(mlp, functools.partial) else mlp.submodules
