"""Seconds of collectives: bytes over the slowest link that a ring crosses, without latency.

A ring moves (n − 1)/n of the bytes through every rank, twice for an all-reduce (nccl-tests, doc/PERFORMANCE.md). Inside
a node it runs on NVLink. Across nodes each rank of a node carries a ring of its own through its own network card, so a
group with k ranks in every node has k cards' bandwidth.
"""

from __future__ import annotations

import math

from megatron_longpo.planning.hardware import GPU, MEASURED_LINK_SHARE


def ranks_per_node(gpu: GPU, group_size: int, stride: int) -> int:
    """How many ranks of a group share a node, when its ranks are ``stride`` apart."""
    # A group's span that does not divide a node, as 4 of 6, is cut somewhere: the smallest piece counts.
    return max(1, math.gcd(group_size * stride, gpu.gpus_per_node) // stride)


def ring_bytes_per_s(gpu: GPU, group_size: int, stride: int) -> float:
    """Bandwidth of a ring over a group's ranks."""
    together = ranks_per_node(gpu, group_size, stride)
    gbs = gpu.nvlink_gbs if together == group_size else min(gpu.nvlink_gbs, together * gpu.network_gbs)
    return gbs * 1e9 * MEASURED_LINK_SHARE


def all_gather_s(gpu: GPU, num_bytes: float, group_size: int, stride: int) -> float:
    """An all-gather to, or a reduce-scatter from, ``num_bytes`` on every rank."""
    return (group_size - 1) / group_size * num_bytes / ring_bytes_per_s(gpu, group_size, stride)


def all_reduce_s(gpu: GPU, num_bytes: float, group_size: int, stride: int) -> float:
    """An all-reduce of ``num_bytes``: a reduce-scatter and an all-gather."""
    return 2 * all_gather_s(gpu, num_bytes, group_size, stride)


def all_to_all_s(gpu: GPU, num_bytes: float, group_size: int, stride: int) -> float:
    """Every rank keeps 1/n of its ``num_bytes`` and sends the rest, to other nodes by its own card."""
    together = ranks_per_node(gpu, group_size, stride)
    inside = (together - 1) / group_size * num_bytes / (gpu.nvlink_gbs * 1e9)
    outside = (group_size - together) / group_size * num_bytes / (gpu.network_gbs * 1e9)
    return max(inside, outside) / MEASURED_LINK_SHARE


def neighbour_s(gpu: GPU, num_bytes: float, stride: int, group_size: int) -> float:
    """``num_bytes`` from a rank to the next of its group."""
    inside = ranks_per_node(gpu, group_size, stride) == group_size
    return num_bytes / ((gpu.nvlink_gbs if inside else gpu.network_gbs) * 1e9 * MEASURED_LINK_SHARE)
