"""Every layout that a run could have, as the command line that asks for it, judged by the trainer's own checks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_longpo.arguments import parse_arguments
from megatron_longpo.config import ConfigError, ModelConfig, RunConfig
from megatron_longpo.config.parallel import CP_COMM_TYPES, HIERARCHICAL
from megatron_longpo.planning.options import MEMORY_OPTIONS, MemoryOption
from megatron_longpo.validation import validate

MAX_VIRTUAL_STAGES = 8
"""More model chunks per rank save little of a bubble that they have divided by 8 already."""


@dataclass(frozen=True)
class Candidate:
    """One layout.

    Args:
        words: Its command line, behind the script's name.
        config: What the trainer makes of it; validated.
        option: How it saves memory.
    """

    words: tuple[str, ...]
    config: RunConfig
    option: MemoryOption


def candidates(
    base: Sequence[str], model: ModelConfig, num_gpus: int, gpus_per_node: int, source: str = "the model"
) -> Iterator[Candidate]:
    """All layouts on this many GPUs that the trainer accepts.

    Tensor parallelism stays within a node and always comes with sequence parallel, which costs nothing. There
    is none on a number of GPUs that fills a node and a part of another.

    Args:
        base: The flags that all of them share.
        model: The checkpoint's shape.
        num_gpus: Ranks.
        gpus_per_node: GPUs that share NVLink.
        source: Names the checkpoint in error messages.
    """
    if not fills_nodes(num_gpus, gpus_per_node):
        return
    for layout in _layouts(model, num_gpus, min(num_gpus, gpus_per_node)):
        # Most layouts fall here, before the options multiply them.
        if _accepted([*base, *layout], model, num_gpus, source) is None:
            continue
        for virtual in _virtual(layout, model):
            words = (*base, *layout, *virtual)
            config = _accepted(words, model, num_gpus, source)
            if config is None:
                continue
            # An option is made of legal parts: parsing and checking all of them would take minutes.
            for option in MEMORY_OPTIONS:
                saving = option.of(config)
                if saving is not None:
                    yield Candidate((*words, *option.words(saving)), saving, option)


def fills_nodes(num_gpus: int, gpus_per_node: int) -> bool:
    """Whether so many GPUs are a part of one node or whole nodes; torchrun starts as many ranks on each."""
    return num_gpus < gpus_per_node or num_gpus % gpus_per_node == 0


def _layouts(model: ModelConfig, num_gpus: int, node: int) -> Iterator[list[str]]:
    """Sizes whose product divides the number of GPUs, with how keys and values travel and the optimizer is held.

    ``node`` is the number of GPUs that the run uses in each node.
    """
    for tp in _divisors(node, node):
        for pp in _divisors(num_gpus // tp, model.num_layers):
            for cp in _divisors(num_gpus // tp // pp, num_gpus):
                words: list[str] = []
                if tp > 1:
                    words += ["--tensor-model-parallel-size", str(tp), "--sequence-parallel"]
                if pp > 1:
                    words += ["--pipeline-model-parallel-size", str(pp)]
                sharded = [["--use-distributed-optimizer"]] if tp * pp < num_gpus else [[]]
                for exchange in _exchanges(tp, cp, node):
                    for optimizer in sharded:
                        yield [*words, *exchange, *optimizer]


def _exchanges(tp: int, cp: int, node: int) -> Iterator[list[str]]:
    """How keys and values travel; ranks that swap heads in front of a ring are those of one node."""
    if cp == 1:
        yield []
        return
    for kind in CP_COMM_TYPES:
        words = ["--context-parallel-size", str(cp), "--cp-comm-type", kind]
        if kind != HIERARCHICAL:
            yield words
            continue
        for inner in _divisors(math.gcd(cp, node // tp), cp - 1):
            if inner > 1:
                yield [*words, "--hierarchical-context-parallel-sizes", str(inner), str(cp // inner)]


def _virtual(layout: Sequence[str], model: ModelConfig) -> Iterator[list[str]]:
    """No virtual stages, then every number of layers per virtual stage."""
    yield []
    if "--pipeline-model-parallel-size" in layout:
        stages = int(layout[layout.index("--pipeline-model-parallel-size") + 1])
        local = model.num_layers // stages
        for layers in _divisors(local, local - 1):
            if local // layers <= MAX_VIRTUAL_STAGES:
                yield ["--num-layers-per-virtual-pipeline-stage", str(layers)]


def _accepted(words: Sequence[str], model: ModelConfig, num_gpus: int, source: str) -> RunConfig | None:
    try:
        config = parse_arguments(words).with_model(model, source).with_device_defaults("local", "nccl")
        validate(config, num_gpus)
    except ConfigError:
        return None
    return config


def _divisors(number: int, at_most: int) -> Iterator[int]:
    return (divisor for divisor in range(1, min(number, at_most) + 1) if number % divisor == 0)
