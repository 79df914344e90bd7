"""A fingerprint of a model's weights that does not depend on how the model is split over ranks."""

from __future__ import annotations

import dataclasses
import hashlib

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_longpo import platform
from megatron_longpo.config import ModelConfig
from megatron_longpo.config.flags import show
from megatron_longpo.model.build import unwrap

_CHUNK = 1 << 24
_MIX = (-0x61C8864680B583EB, -0x4B47D0C5A1B8A5F3)  # odd 64-bit constants; int64 products wrap
_INT_VIEW = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def weights_fingerprint(chunks: list[torch.nn.Module]) -> str:
    """Hash all weights, the same value under every TP, PP, virtual-PP, CP and DP size and for ``local`` and TE specs.

    Every element's bits are mixed, and the results are summed modulo 2^64 with a factor per parameter: sums do not
    depend on order, so shards can be hashed where they lie. Vocabulary padding, whose size depends on TP, is left out.
    It tells models apart; it is no protection against someone who builds a collision.

    Collectives: 1 all-reduce over tensor- and pipeline-parallel ranks.

    Returns:
        16 hexadecimal digits.
    """
    total = torch.zeros((), dtype=torch.int64)
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    for chunk in chunks:
        model = unwrap(chunk)
        layer_numbers = {f"decoder.layers.{i}.": layer.layer_number for i, layer in enumerate(model.decoder.layers)}
        for name, parameter in model.named_parameters():
            if getattr(parameter, "shared", False) and not model.pre_process:
                continue  # the last stage's copy of tied embeddings
            sharded = getattr(parameter, "tensor_model_parallel", False)
            if not sharded and tp_rank != 0:
                continue
            for prefix, number in layer_numbers.items():
                if name.startswith(prefix):
                    name = f"decoder.layers.{number}.{name.removeprefix(prefix)}"
                    break
            values = parameter.detach()
            if name.startswith(("embedding.word_embeddings", "output_layer")):
                values = values[: max(0, model.model_shape.vocab_size - tp_rank * len(values))]
            total += _factor(name) * _mixed_sum(values).cpu()
    total = total.to(platform.device())
    dist.all_reduce(total, group=parallel_state.get_model_parallel_group())
    return f"{int(total.item()) & (1 << 64) - 1:016x}"


def rope_scaling_mark(model: ModelConfig) -> str:
    """What to add to the fingerprint of weights that are evaluated with scaled RoPE: kind and numbers, or nothing."""
    kind = "yarn" if model.position_embedding_type == "yarn" else "rope" if model.use_rope_scaling else None
    if kind is None:
        return ""
    values = [getattr(model, field.name) for field in dataclasses.fields(model) if field.name.startswith(f"{kind}_")]
    return "-".join(["", "llama3" if kind == "rope" else kind, *map(show, values)])


def _factor(name: str) -> int:
    digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True)
    return digest | 1


def _mixed_sum(values: torch.Tensor) -> torch.Tensor:
    bits = values.contiguous().view(-1).view(_INT_VIEW[values.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for start in range(0, bits.numel(), _CHUNK):
        mixed = bits[start : start + _CHUNK].long() * _MIX[0]
        mixed = (mixed ^ (mixed >> 29)) * _MIX[1]
        total += (mixed ^ (mixed >> 32)).sum()
    return total
