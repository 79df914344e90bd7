"""Seconds of attention, and of context parallelism's transfers as far as attention does not hide them."""

# t=tokens of a rank N=query heads G=key/value heads D=head_dim

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_longpo.attention.all_gather import head_chunks
from megatron_longpo.config import RunConfig
from megatron_longpo.model.flops import attention_flops
from megatron_longpo.planning.hardware import GPU
from megatron_longpo.planning.links import all_gather_s, all_to_all_s, neighbour_s
from megatron_longpo.planning.recomputation import Repeated
from megatron_longpo.planning.ring_work import hop_tokens, step_shares
from megatron_longpo.planning.saved import element_bytes
from megatron_longpo.planning.workload import Work

FLASH_BACKWARD = 2.5
"""FLOPs of FlashAttention's backward over its forward: five matrix products for two (arXiv 2307.08691, section 4.1)."""


def attention_s(config: RunConfig, work: Work, gpu: GPU) -> tuple[float, float]:
    """Attention of a rank's layers, forward and backward."""
    parallel = config.parallel
    flops = attention_flops(config.model, work.layout) / parallel.model_parallel_size
    forward, backward = (tflops * 1e12 for tflops in gpu.attention_rates(config.training.attention_backend))
    return flops / forward, FLASH_BACKWARD * flops / backward


def context_parallel_s(config: RunConfig, work: Work, gpu: GPU, again: Repeated, in_chunks: bool = True) -> float:
    """What is waited for in all layers of a rank, by ``--cp-comm-type``.

    ``all_gather``: `_gather_s`. ``a2a``: Q, K, V and the output, and their gradients (arXiv 2309.14509, section 3.2).
    ``p2p``: `_ring_s` (arXiv 2310.01889, section 3). ``a2a+p2p``: the first in a group of ranks, then the second in a
    ring of fewer steps, with as many bytes in each (arXiv 2405.07719).
    """
    model, parallel = config.model, config.parallel
    cp, tp = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    if cp == 1:
        return 0.0
    if parallel.cp_comm_type == "all_gather":
        return _gather_s(config, work, gpu, again, in_chunks)
    inner, ring = parallel.hierarchical_context_parallel_sizes or (
        (cp, 1) if parallel.cp_comm_type == "a2a" else (1, cp)
    )
    layers = model.num_layers / parallel.pipeline_model_parallel_size
    size = element_bytes(config)
    query, key = model.query_width / tp, model.kv_width / tp
    one_way = all_to_all_s(gpu, size * work.layout.padded_tokens / cp * (2 * query + 2 * key), inner, stride=tp)
    seconds = layers * (2 + again.exchange) * one_way
    if ring > 1:
        layout = replace(work.layout.over(ring), window_tokens=model.window_size.num_tokens)
        hop_s = layers * neighbour_s(gpu, hop_tokens(layout) * 2 * key / inner, stride=tp * inner, group_size=ring)
        forward_s, backward_s = (
            [part * share for share in step_shares(layout)] for part in attention_s(config, work, gpu)
        )
        seconds += (1 + again.attention) * _ring_s(size * hop_s, forward_s)
        seconds += _ring_s(size * hop_s, backward_s, 4 * hop_s)
    return seconds


def _gather_s(config: RunConfig, work: Work, gpu: GPU, again: Repeated, in_chunks: bool) -> float:
    """K and V of the row in forward and again in backward, their gradients back in fp32, whatever the window.

    Of the chunks of heads (`attention.all_gather`) one is waited for, the others for what is longer than the attention
    that hides them; in backward the first gather is ahead of the layer where attention is not computed again.
    """
    model, parallel = config.model, config.parallel
    cp, tp = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    layers = model.num_layers / parallel.pipeline_model_parallel_size
    values, size = work.layout.padded_tokens * 2 * model.kv_width / tp, element_bytes(config)
    forward_s, backward_s = attention_s(config, work, gpu)
    gather, scatter = (layers * all_gather_s(gpu, each * values, cp, stride=tp) for each in (size, 4))
    heads, key_heads = model.num_attention_heads // tp, model.num_query_groups // tp
    shared = 1 / len(head_chunks(heads, key_heads, round(size * values / cp))) if in_chunks else 1.0

    def waited(transfer_s: float, hidden_behind_s: float, ahead_s: float = 0.0) -> float:
        return shared * (transfer_s - ahead_s) + (1 - shared) * max(0.0, transfer_s - hidden_behind_s)

    ahead_s = (1 - again.attention) * gather if in_chunks else 0.0
    return (1 + again.attention) * waited(gather, forward_s) + waited(gather + scatter, backward_s, ahead_s)


def _ring_s(keys_s: float, steps_s: Sequence[float], gradients_s: float = 0.0) -> float:
    """What a ring waits for beyond the attention of its steps (`attention.ring`).

    Every step but the last sends keys and values on. In backward every step but the first sends its gradients too, one
    step behind: those of the last are hidden by nothing. A step waits for what is longer than its own attention.

    Args:
        keys_s: Seconds of a hop of keys and values.
        steps_s: Seconds of attention in every step.
        gradients_s: Seconds of a hop of fp32 gradients, 0 in forward.
    """
    last = len(steps_s) - 1
    sent_s = [keys_s * (step < last) + gradients_s * (step > 1) for step in range(last + 1)]
    return gradients_s + sum(max(0.0, sent - step) for sent, step in zip(sent_s, steps_s, strict=True))
